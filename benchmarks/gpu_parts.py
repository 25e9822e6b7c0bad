"""The parts of benchmarks/gpu.py, each in a process of its own: a fault of one cannot spoil the next.

    python -m benchmarks.gpu_parts PART SETTINGS

SETTINGS is a `Settings` as JSON. Rows go to its file as they are measured, one JSON object a line, so that what a part
had measured is there if it is ended before its time.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_steps import Note, Row, Settings, against, asked, configured, seconds, stepper, steps
from benchmarks.photographs import make_images
from benchmarks.u2pl_step import wait
from pipeline import checkpoint
from pipeline.checkpoint import METRICS_FILE, STATE_FILE, Progress
from pipeline.cluster.failures import out_of_memory
from pipeline.config.methods import SPECS
from pipeline.config.schema import Config
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.inference.evaluate import evaluate
from pipeline.inference.load import autocast
from pipeline.ingest.loader import Loader
from pipeline.ingest.read import read_inline
from pipeline.methods import Predictor, make_config
from pipeline.training.runtime import machine
from pipeline.training.snapshot import snapshot

# ---- the machine -------------------------------------------------------------------------------------------------


def describe(settings: Settings, note: Note) -> None:
    """Names and versions; makes the photographs that other parts read."""
    device = settings.on
    about: Row = dict(machine(device))
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        about |= {"GPU GiB": found.total_memory / 2**30, "cuda": torch.version.cuda}
        about["cudnn"] = torch.backends.cudnn.version()
    note(about)
    if not Path(settings.data, "dataset.json").exists() and "://" not in settings.data:
        train, val = settings.sizes.photographs
        make_images(train, [settings.data], distinct=min(256, max(val, train // 4)), val=val)


# ---- a: the tests of a GPU ---------------------------------------------------------------------------------------


class _Results:
    """Counts the outcomes of pytest by test function, and notes each as the next one begins."""

    def __init__(self, note: Note) -> None:
        self._note, self._row = note, Row()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of set-up, call and tear-down of each case."""
        name = report.nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
        if name != self._row.get("test"):
            self.finish()
            self._row = {"test": name, "passed": 0, "failed": 0, "skipped": 0, "s": 0.0}
        self._row["s"] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self._row[report.outcome] += 1
        if report.failed:
            self._row.setdefault("first failure", f"{report.nodeid.rpartition('::')[2]}: {_brief(report.longreprtext)}")

    def finish(self) -> None:
        """Notes the last function."""
        if self._row:
            self._note(self._row)


def _brief(text: str) -> str:
    """The line of a traceback that says what is wrong."""
    lines = [line.removeprefix("E").strip() for line in text.splitlines() if line.startswith("E ")]
    return (lines or text.strip().splitlines() or ["?"])[0][:200]


def tests(settings: Settings, note: Note) -> None:
    """Those of tests/gpu: kernels and compiled functions against float64 on the CPU, steps, resumed states."""
    os.environ["TEST_DEVICE"] = settings.device
    results = _Results(note)
    # without conftest.py, which wants servers that a bare machine lacks
    code = pytest.main(["-q", "--noconftest", "-p", "no:cacheprovider", "tests/gpu"], plugins=[results])
    results.finish()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}")


# ---- e: a run ----------------------------------------------------------------------------------------------------

RUN_STEPS = 60


def run(settings: Settings, note: Note) -> None:
    """One Ray Train worker: steps, checkpoint, evaluation, and the second half once more from a checkpoint."""
    # it imports Ray, which a machine may lack
    from pipeline.training.launch import launch

    sizes, shot = settings.sizes, settings.sizes.shots[0]
    config = make_config(
        {
            "method": "u2pl", "data.root": settings.data, "out": str(Path(settings.folder, "run")), "split": "1_2",
            "data.crop": [shot.crop] * 2, "model.weights": "none", **sizes.values,
            "optim.batch_labeled": sizes.batch, "optim.batch_unlabeled": sizes.batch, "optim.steps": RUN_STEPS,
            "u2pl.warmup": 0.2, "eval.every": RUN_STEPS, "scaling.workers": "1", "run.log_every": 10,
            "run.checkpoint_every": RUN_STEPS // 2, "run.precision": "bf16", "run.tensorboard": False,
            "run.pictures": 0,
        }
    )  # fmt: skip
    for name, start in (("whole", None), ("second half again", checkpoint.name(RUN_STEPS // 2))):
        began = time.perf_counter()
        launch(config, resume_from=start)
        spent, last = time.perf_counter() - began, _last_records(config)
        train, score = last["train"], last["eval"]
        row: Row = {"run": name, "s": spent, "images/s at its end": train["images_per_second"]}
        row |= {"loss at its end": train["total"], **{f"mIoU {key}": value for key, value in score["miou"].items()}}
        note(row | {"s of the evaluation": score["worker_seconds"]})


def _last_records(config: Config) -> dict[str, Row]:
    """The newest record of each kind of a run."""
    lines = Path(str(config.out), METRICS_FILE).read_text().splitlines()
    return {record["kind"]: record for record in map(json.loads, lines)}


# ---- f: decoding -------------------------------------------------------------------------------------------------


def decoding(settings: Settings, note: Note) -> None:
    """Images a second by decoding threads, and how many operations Python launches a second beside them."""
    alone = _launches(settings)
    note({"threads": 0, "launches/s": alone})
    for threads in settings.sizes.threads:
        with _decoding(settings, threads) as done:
            before, began = done(), time.perf_counter()
            time.sleep(settings.sizes.seconds)
            rate = (done() - before) / (time.perf_counter() - began)
            before, began = done(), time.perf_counter()
            launched = _launches(settings)
            beside = (done() - before) / (time.perf_counter() - began)
        row: Row = {"threads": threads, "launches/s": launched, "of those alone": launched / alone}
        note(row | {"images/s": rate, "images/s beside launches": beside})


def _launches(settings: Settings) -> float:
    """Small operations that this thread gives to the device in a second."""
    x, count, began = torch.zeros(1, device=settings.on), 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < settings.sizes.seconds:
        for _ in range(200):
            x.add_(1.0)
        wait(settings.on)  # the device's queue is short; these are so small that it costs little
        count += 200
    return count / spent


@contextmanager
def _decoding(settings: Settings, threads: int) -> Iterator[Callable[[], int]]:
    """The loader of U2PL at work, in so many threads; what is given counts the images so far."""
    dataset = open_dataset(settings.data)
    config = make_config({"method": "u2pl", "optim.batch_labeled": 4, "optim.batch_unlabeled": 4})
    loader = Loader(
        config, dataset, load_split(dataset, "1_2"), SPECS[config.method].views, rank=0, world=1, start=0,
        threads=threads, reader=read_inline, pinned=settings.device == "cuda",
    )  # fmt: skip
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    ended = threading.Event()

    def take() -> None:
        while not ended.is_set():
            next(batches)

    taker = threading.Thread(target=take)
    taker.start()
    try:
        yield lambda: loader.stats.samples
    finally:
        ended.set()
        taker.join()
        loader.close()


# ---- g: what stands beside the steps -----------------------------------------------------------------------------


def beside(settings: Settings, note: Note) -> None:
    """Evaluation, a checkpoint, and what is said when memory does not suffice."""
    device, shot = settings.on, settings.sizes.shots[0]
    dataset = open_dataset(settings.data)
    classes = len(dataset.info.classes)
    config = configured(settings.sizes, shot, "bf16")
    method, trainer, step = stepper(config, classes, device)
    step()  # optimisers have no state before

    def scored() -> None:
        with autocast(device, config.run):
            evaluate(Predictor(next(iter(method.networks().values()))), dataset, config.eval, device)

    scored()
    note({"what": "evaluation, images/s", "value": dataset.info.counts["val"] / seconds(scored, device)})
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        about: Row = {"index": "", "split": "", "classes": list(dataset.info.classes)}
        states = {"method": method.state_dict(), "optimizer": trainer.optimizer.state_dict()}
        for which in ("first", "second"):  # pinned memory is kept for the next one
            began = time.perf_counter()
            taken = snapshot(states)
            note({"what": f"{which} snapshot, s that training stands still", "value": time.perf_counter() - began})
            taken()
            note({"what": f"{which} snapshot, s until it is there", "value": time.perf_counter() - began})
        save = partial(checkpoint.save, Path(folder), config, about, {}, Progress(1), **taken())
        note({"what": "checkpoint from it, s", "value": seconds(save, device)})
        note({"what": "its MB", "value": Path(folder, STATE_FILE).stat().st_size / 1e6})
    try:
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        note({"what": "out of memory", "value": str(out_of_memory(error, str(machine(device)["device"])))})
    step()
    note({"what": "the step after that", "value": "runs"})


# ---- one part ----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Settings, Note], None]] = {
    "machine": describe, "a": tests, "b": steps, "c": against, "d": asked, "e": run, "f": decoding, "g": beside
}  # fmt: skip


def main() -> None:
    """Runs one part."""
    settings = Settings(**json.loads(sys.argv[2]))
    with open(settings.rows, "a", buffering=1) as file:
        PARTS[sys.argv[1]](settings, lambda row: print(json.dumps(row), file=file))


if __name__ == "__main__":
    main()
