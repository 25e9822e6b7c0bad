"""Steps of benchmarks/gpu.py: how long they take, what memory they need, and what they ask of the GPU."""

import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.device_step import GPU_PRESETS, bare_trainer, case
from benchmarks.methods import make_views
from benchmarks.u2pl_step import SHAPES, Shape, interleaved, make_case, ours, wait
from pipeline.batch import Batch
from pipeline.config.schema import Config
from pipeline.inference.load import autocast
from pipeline.methods import Method, build_method
from pipeline.models.compiled import compile_networks
from pipeline.ops import kernel
from pipeline.training.trainer import Trainer

Row = dict[str, Any]
Note = Callable[[Row], None]
"""Keeps a row; a title says what a value is, and its unit."""
PRECISIONS = ("bf16", "tf32", "fp32")


class Shot(NamedTuple):
    """One size of a step."""

    preset: str
    crop: int
    """Height and width."""
    images: int
    """Labeled ones, and as many unlabeled ones."""

    @property
    def name(self) -> str:
        """Both sizes."""
        return f"{self.crop} x {self.crop}, {self.images} + {self.images}"


@dataclass(frozen=True)
class Sizes:
    """What differs between the day with a GPU and its rehearsal."""

    values: Mapping[str, Any]
    """Of the config, by dotted key."""
    shots: tuple[Shot, ...]
    compiled: tuple[tuple[Shot, str], ...]
    """With which precisions the losses are compiled, too."""
    rounds: int
    """Steps of which the median is taken."""
    extra: Shape | None
    """Of part c in the place of the release's."""
    batch: int
    """Labeled images of a step of the run in part e, and as many unlabeled ones."""
    threads: tuple[int, ...]
    seconds: float
    """Of each measurement of decoding."""
    photographs: tuple[int, int]
    """Images without a mask, and for validation."""


_VOC, _VOC_WHOLE, _CITY = Shot("voc_classic", 513, 4), Shot("voc_classic", 513, 16), Shot("cityscapes", 769, 2)
_TINY = (Shot("voc_classic", 33, 2), Shot("voc_classic", 65, 4), Shot("cityscapes", 97, 2))
SIZES = {
    "cuda": Sizes(
        values={"model.backbone": "resnet101"}, shots=(_VOC, _VOC_WHOLE, _CITY),
        compiled=tuple((shot, precision) for precision in PRECISIONS for shot in (_VOC, _VOC_WHOLE, _CITY)),
        rounds=20, extra=None, batch=16, threads=(1, 2, 4, 8, 12), seconds=3.0, photographs=(512, 128),
    ),
    "cpu": Sizes(
        values={"model.backbone": "tiny", "u2pl.queue": 300, "u2pl.queue_background": 500}, shots=_TINY,
        compiled=((_TINY[0], "bf16"),), rounds=5, extra=Shape(21, 2, 17), batch=4, threads=(1, 2), seconds=1.0,
        photographs=(64, 8),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a part is told."""

    device: str
    """cuda or cpu."""
    data: str
    """A prepared dataset; written by the part `machine` if it is not there."""
    folder: str
    """For what is made on the way."""
    rows: str
    """File for the rows."""
    against: str | None
    """MODULE:FUNCTION of a second implementation, for part c."""

    @property
    def sizes(self) -> Sizes:
        """Those of the device."""
        return SIZES[self.device]

    @property
    def on(self) -> torch.device:
        """The device."""
        return torch.device(self.device)


# ---- a step ------------------------------------------------------------------------------------------------------


def configured(sizes: Sizes, shot: Shot, precision: str, *, network: bool = False) -> Config:
    """U2PL on the preset of a shot, with its crop and batch; `network`: with its network compiled."""
    return case(
        "u2pl", shot.preset,
        **{
            **sizes.values, "data.crop": [shot.crop] * 2, "optim.batch_labeled": shot.images,
            "optim.batch_unlabeled": shot.images, "run.precision": precision, "run.compile_network": network,
        },
    )  # fmt: skip


def stepper(config: Config, classes: int, device: torch.device) -> tuple[Method, Any, Callable[[], None]]:
    """A method, the trainer's own step around it, and a call that makes one step in the middle of a run."""
    torch.manual_seed(0)
    method = build_method(config, classes).to(device).train()
    trainer, size, optim = bare_trainer(config, method, device), config.data.crop[0], config.optim
    sides = [
        make_views(count, size, method.views.strong * (not labeled), labeled=labeled, classes=classes)
        for count, labeled in ((optim.batch_labeled, True), (optim.batch_unlabeled, False))
    ]
    batch, index = Batch(*sides).to(device), optim.steps // 2
    if config.run.compile_network:
        image = torch.cat([side.image for side in sides]).to(device)
        with autocast(device, config.run):
            problem = compile_networks(list(method.networks().values()), method.trained()[0], image)
        if problem:
            raise RuntimeError(problem)
    return method, trainer, lambda: Trainer.step(trainer, batch, index) and None


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call, until the device has done it."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def begin_peak(device: torch.device) -> None:
    """Peaks of memory count from here on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # some systems do not let one: then it counts from the start of the process
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> float:
    """GiB at the most since `begin_peak`: tensors of a GPU, or the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


# ---- b: steps ----------------------------------------------------------------------------------------------------


def steps(settings: Settings, note: Note) -> None:
    """Time and memory of a step, by size and precision, with losses and network as they are written and compiled."""
    for shot, precision in product(settings.sizes.shots, PRECISIONS):
        _measured(settings, shot, precision, "as written", note)
    if kernel.activate(settings.on):
        for shot, precision in settings.sizes.compiled:
            _measured(settings, shot, precision, "compiled", note)
        _measured(settings, settings.sizes.shots[0], "bf16", "compiled", note, network=True)


def _measured(
    settings: Settings, shot: Shot, precision: str, losses: str, note: Note, *, network: bool = False
) -> None:
    """One row; memory that does not suffice is a row, too, and so is a network that does not compile."""
    device, sizes = settings.on, settings.sizes
    row: Row = {"size": shot.name, "precision": precision, "losses": losses}
    row["network"] = "compiled" if network else "as written"
    begin_peak(device)
    began = time.perf_counter()
    try:
        step = stepper(configured(sizes, shot, precision, network=network), GPU_PRESETS[shot.preset], device)[2]
        made = time.perf_counter() - began if network else 0.0
        first = made + seconds(step, device)
        step()
        times = [seconds(step, device) for _ in range(sizes.rounds)]
    except RuntimeError as error:
        row["failed"] = str(error).partition(". ")[0]
    else:
        middle = statistics.median(times)
        row |= {"ms": 1e3 * middle, "fastest": 1e3 * min(times), "slowest": 1e3 * max(times)}
        row |= {"images/s": 2 * shot.images / middle, "peak GiB": peak(device), "first step s": first}
    note(row)


# ---- c: a second implementation ----------------------------------------------------------------------------------


def against(settings: Settings, note: Note) -> None:
    """U2PL's extra beside the implementation that is named, in turn; see benchmarks/u2pl_step.py."""
    if settings.against is None:
        return
    module, _, function = settings.against.partition(":")
    made = {"ours": partial(ours, groups=0), settings.against: getattr(import_module(module), function)}
    kernel.activate(settings.on)
    shape = settings.sizes.extra or SHAPES["voc"]
    queues = (30_000, 50_000) if settings.sizes.extra is None else (300, 500)
    cases = {
        name: make_case(
            shape, channels_last=name == "ours", queue=queues[0], background=queues[1], device=settings.device
        )
        for name in made
    }
    calls = {name: make(cases[name]) for name, make in made.items()}
    for part, contrast in {"whole extra": True, "entropy + CE": False}.items():
        times = interleaved(cases, calls, settings.sizes.rounds, contrast=contrast)
        for name, spent in times.items():
            ratio = statistics.median(other / own for other, own in zip(times["ours"], spent, strict=True))
            note({"part": part, "by": name, "ms": statistics.median(spent), "x ours": ratio})


# ---- d: what a step asks of the GPU ------------------------------------------------------------------------------

TRACED = 5
"""Steps under the profiler."""


def asked(settings: Settings, note: Note) -> None:
    """Kernels, waits and copies of a step, and how long the GPU is busy with it."""
    shot = settings.sizes.shots[0]
    for losses in ("as written", "compiled"):
        if losses == "compiled" and not kernel.activate(settings.on):
            return
        step = stepper(configured(settings.sizes, shot, "bf16"), GPU_PRESETS[shot.preset], settings.on)[2]
        for _ in range(3):
            step()
        alone = 1e3 * seconds(partial(_repeat, step), settings.on) / TRACED
        found = _traced(step, settings)
        row: Row = {"size": shot.name, "losses": losses, "ms": alone}
        note(row | found | {"busy share": found["busy ms"] / alone})


def _repeat(step: Callable[[], None]) -> None:
    for _ in range(TRACED):
        step()


def _traced(step: Callable[[], None], settings: Settings) -> Row:
    """What one of some steps comes to under the profiler, which makes them slower."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (settings.device == "cuda")
    with profile(activities=activities) as profiler, _told(settings.on) as told:
        seconds(partial(_repeat, step), settings.on)
    file = Path(settings.folder, "trace.json")
    profiler.export_chrome_trace(str(file))
    warned = sum("synchroniz" in str(each.message) for each in told)
    return {"warned of waits": warned / TRACED, **counted(json.loads(file.read_text())["traceEvents"], TRACED)}


@contextmanager
def _told(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """All warnings, also those of operations that wait for the GPU."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield told
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def counted(events: Iterable[Mapping[str, Any]], count: int) -> Row:
    """What a trace of torch's profiler holds, for one of `count` steps.

    Args:
        events: of Chrome's format, with `cat`, `name`, and `ts` and `dur` in microseconds.
        count: of the steps.
    """
    found = [(str(each.get("cat")), str(each.get("name")), each) for each in events if "dur" in each]
    kernels = [each for kind, _, each in found if kind == "kernel"]
    moves = [each for kind, _, each in found if kind in ("gpu_memcpy", "gpu_memset")]
    across = [name for kind, name, _ in found if kind == "gpu_memcpy" and ("HtoD" in name or "DtoH" in name)]
    waits = [name for kind, name, _ in found if kind.startswith("cuda_") and "Synchronize" in name]
    operations = [name for kind, name, _ in found if kind == "cpu_op"]
    return {
        "operations": len(operations) / count,
        "kernels": len(kernels) / count,
        "waits": len(waits) / count,
        "copies to or from the host": len(across) / count,
        "busy ms": busy([(each["ts"], each["ts"] + each["dur"]) for each in [*kernels, *moves]]) / 1e3 / count,
    }


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of some spans, each a begin and an end, lasts."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
