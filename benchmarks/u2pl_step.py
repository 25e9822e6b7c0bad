"""What U2PL adds to a supervised step, on one CPU thread: time, share of a full step, memory.

    python benchmarks/u2pl_step.py [--shape voc|cityscapes] [--groups 0|64|16] [--against MODULE:FUNCTION]

The extra is everything between the networks' outputs and their gradients: thresholds, L_u, L_c and the memory bank,
from low-resolution logits and features to low-resolution gradients. Shapes are those of the release: PASCAL VOC (21
classes, 4 + 4 images, 513 crops, features 129x129x256) and Cityscapes (19 classes, 2 + 2, 769, 193x193), the bank
full.

A second implementation is timed in the same run, a round of one and a round of the other in turn, so that the ratio
holds on a machine whose speed drifts. FUNCTION takes a `Case` and returns a function `step(contrast)` that gives the
loss of one step, L_u + L_c, or L_u with the thresholds and masks alone; the benchmark calls `backward` on it.
"""

import argparse
import ctypes
import importlib
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installation, like the jobs

from pipeline.config.options import U2PLOptions
from pipeline.config.schema import ModelConfig
from pipeline.methods.u2pl.bank import MemoryBank
from pipeline.methods.u2pl.fast import candidates, contrastive, positives, unsupervised
from pipeline.methods.u2pl.reference import Draws, Pixels, Rule
from pipeline.models import build_model
from pipeline.ops import kernel
from pipeline.ops.entropy import IGNORE
from pipeline.ops.grid import shrink
from pipeline.ops.schedules import unreliable_share
from pipeline.ops.world import World

Step = Callable[[bool], Tensor]
DIM = 256
PROGRESS = 0.25
"""Share of the training that is done: it sets alpha_t."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one step."""

    classes: int
    images: int
    """Labeled images, and as many unlabeled ones."""
    small: int
    """Height and width of the network's outputs; labels have 4 (small - 1) + 1."""

    @property
    def large(self) -> int:
        """Height and width of the labels."""
        return 4 * (self.small - 1) + 1


SHAPES = {"voc": Shape(21, 4, 129), "cityscapes": Shape(19, 2, 193)}


@dataclass(frozen=True)
class Case:
    """The outputs of student and teacher on labeled images, then on unlabeled ones; the labels; a full bank."""

    shape: Shape
    student_logits: Tensor
    """float32 [B,C,h,w], gets a gradient."""
    teacher_logits: Tensor
    """float32 [B,C,h,w]."""
    student_features: Tensor
    """float32 [B,256,h,w], gets a gradient."""
    teacher_features: Tensor
    """float32 [B,256,h,w]."""
    truth: Tensor
    """int64 [B/2,H,W], 255 ignored."""
    pseudo_label: Tensor
    """int64 [B/2,H,W] of the unlabeled images, 255 ignored."""
    queues: tuple[int, ...]
    """Capacity of each class's queue."""
    queue: Callable[[int], Tensor]
    """The keys in a class's queue, oldest first: float32 [capacity,256], of length 1."""
    progress: float = PROGRESS
    """Share of the training that is done."""


def make_case(shape: Shape, *, channels_last: bool, queue: int, background: int, device: str = "cpu") -> Case:
    """Smooth scores with some noise, on `device`; about two thirds of the classes occur."""
    generator = torch.Generator().manual_seed(0)
    count, classes, h = 2 * shape.images, shape.classes, shape.small

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def resized(x: Tensor, size: int) -> Tensor:
        return F.interpolate(x, (size, size), mode="bilinear", align_corners=True)

    smooth = 3 * resized(noise(count, classes, 9, 9), h)
    smooth[:, -(classes // 3) :] -= 8 if classes > 2 else 0
    student, teacher = (smooth + 0.5 * noise(count, classes, h, h) for _ in range(2))
    truth, pseudo_label = (
        resized(scores, shape.large).argmax(1) for scores in (smooth[: shape.images], teacher[shape.images :])
    )
    truth[:, :5], pseudo_label[:, :, :5] = IGNORE, IGNORE
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = [noise(count, DIM, h, h).contiguous(memory_format=layout) for _ in range(2)]
    return Case(
        shape,
        student.to(device).requires_grad_(),
        teacher.to(device),
        features[0].to(device).requires_grad_(),
        features[1].to(device),
        truth.to(device),
        pseudo_label.to(device),
        (background, *[queue] * (classes - 1)),
        lambda label: F.normalize(
            torch.randn((queue if label else background), DIM, generator=torch.Generator().manual_seed(label)), dim=1
        ),
    )


def ours(case: Case, groups: int) -> Step:
    """The project's own functions, put together as `pipeline.methods.u2pl.u2pl` does."""
    options, world, shape = U2PLOptions(negative_groups=groups), World(), case.shape
    device = case.truth.device
    bank = MemoryBank(case.queues, DIM).to(device)
    for label, (start, size) in enumerate(zip(bank.offset.tolist(), case.queues, strict=True)):
        bank.keys[start : start + size] = case.queue(label)
    bank.count.copy_(bank.size)
    rule = Rule(options.delta_p, min(options.r_l, shape.classes - 1), options.r_h)  # ranks end at the classes
    small = (shape.small, shape.small)
    small_truth, small_label = shrink(case.truth, small), shrink(case.pseudo_label, small)
    count, shown = shape.images, torch.ones_like(case.pseudo_label, dtype=torch.bool)

    def step(contrast: bool) -> Tensor:
        alpha = torch.full((1,), unreliable_share(round(1000 * case.progress), 1000, options.alpha_0), device=device)
        student, teacher = case.student_logits[count:], case.teacher_logits[count:]
        split = unsupervised(student, teacher, case.pseudo_label, shown, 1.0 - alpha, world, world)
        if not contrast:
            return split.loss
        known = small_truth != IGNORE
        pixels = Pixels(
            case.student_features,
            case.teacher_features,
            case.teacher_logits,
            torch.cat([small_truth, small_label]),
            torch.cat([known, split.reliable]),
            torch.cat([known, split.unreliable]),
            count,
        )
        draws = Draws(
            torch.rand(shape.classes, options.anchors, device=device),
            torch.rand(shape.classes, options.keys, device=device),
            torch.rand(shape.classes, options.groups, options.negatives, device=device),
        )
        found = candidates(pixels, rule, draws)
        positive = positives(found, world)
        return split.loss + contrastive(pixels, found, positive, bank, draws, options.temperature, world)

    return step


# ---- measuring -------------------------------------------------------------------------------------------------

PARTS = {"whole extra": True, "entropy + CE": False}
"""Rows of the table: with the contrastive part or without."""


def timed(case: Case, step: Step, *, contrast: bool) -> float:
    """Milliseconds of one forward and backward."""
    case.student_logits.grad = case.student_features.grad = None
    wait(case.truth.device)
    start = time.perf_counter()
    step(contrast).backward()
    wait(case.truth.device)
    return 1e3 * (time.perf_counter() - start)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reuse_heap() -> None:
    """Keeps freed memory in the process, as a GPU's allocator does: fresh pages would cost more than the work."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for any block
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except OSError:
        print("note: no glibc, so memory goes back to the system between steps")


def interleaved(
    cases: dict[str, Case], steps: dict[str, Step], rounds: int, *, contrast: bool
) -> dict[str, list[float]]:
    """Times of every implementation, one round of each in turn; two rounds to warm up are thrown away."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 2):
        for name, step in steps.items():
            spent = timed(cases[name], step, contrast=contrast)
            if index >= 2:
                times[name].append(spent)
    return times


def report(times: dict[str, list[float]], part: str) -> None:
    """One line per implementation; the ratio is the median of the rounds' ratios."""
    first, base = next(iter(times.items()))
    for name, spent in times.items():
        ratio = statistics.median(other / own for own, other in zip(base, spent, strict=True))
        spread = f"{min(spent):7.0f} .. {max(spent):.0f}"
        print(f"{part:14} {name:24} {statistics.median(spent):7.0f} ms  ({spread})  {ratio:6.2f} x {first}", flush=True)


def copy_rate() -> float:
    """GB/s of a large copy, read plus write: what the machine gives at the moment."""
    source, target = torch.ones(1 << 25), torch.empty(1 << 25)
    target.copy_(source)
    start = time.perf_counter()
    target.copy_(source)
    return 2 * 4 * (1 << 25) / (time.perf_counter() - start) / 1e9


def peak_memory(arguments: argparse.Namespace, name: str, connection: Connection) -> None:
    """In a process of its own: MB above what case, bank and gradients hold, over three steps."""
    case, step = build(arguments, name)
    step(True).backward()
    case.student_logits.grad = case.student_features.grad = None
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    clear.write_text("5")  # resets the peak
    before = _megabytes(status, "VmRSS")
    for _ in range(3):
        timed(case, step, contrast=True)
    connection.send(_megabytes(status, "VmHWM") - before)


def _megabytes(status: Path, key: str) -> float:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)) / 1024


def full_step(arguments: argparse.Namespace) -> float:
    """Milliseconds of the networks' part of a step: ResNet-101 DeepLabV3+, measured with two images, scaled up."""
    shape = the_shape(arguments)
    config = ModelConfig(backbone="resnet101", weights="none")
    network = build_model(config, shape.classes, features=True).train()
    image = torch.randint(0, 256, (2, 3, shape.large, shape.large), dtype=torch.uint8)
    start = time.perf_counter()
    prediction = network(image)
    assert prediction.features is not None
    (prediction.logits.sum() + prediction.features.sum()).backward()
    trained = time.perf_counter() - start
    start = time.perf_counter()
    with torch.no_grad():
        network(image)
    looked = time.perf_counter() - start
    # the student sees 2n images; the teacher n in evaluation and 2n in training mode
    return 1e3 * (2 * shape.images / 2 * trained + 3 * shape.images / 2 * looked)


# ---- the command -----------------------------------------------------------------------------------------------


def the_shape(arguments: argparse.Namespace) -> Shape:
    """The named shape, with what the flags change."""
    shape = SHAPES[arguments.shape]
    return Shape(arguments.classes or shape.classes, shape.images, arguments.small or shape.small)


def build(arguments: argparse.Namespace, name: str) -> tuple[Case, Step]:
    """A case in the implementation's favourite layout, and its step."""
    if name.startswith("ours"):
        if arguments.compile:
            kernel.activate(torch.device("cpu"))
        case = make_case(the_shape(arguments), channels_last=True, queue=arguments.queue, background=arguments.queue_0)
        return case, ours(case, arguments.groups)
    module, _, function = name.partition(":")
    channels_last = arguments.against_layout == "channels_last"
    case = make_case(
        the_shape(arguments), channels_last=channels_last, queue=arguments.queue, background=arguments.queue_0
    )
    return case, getattr(importlib.import_module(module), function)(case)


def main() -> None:
    """Runs what the flags ask for and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="voc")
    parser.add_argument("--classes", type=int, default=0, help="another number of classes")
    parser.add_argument("--small", type=int, default=0, help="another height and width of the networks' outputs")
    parser.add_argument("--queue", type=int, default=30_000, help="keys per class in the bank")
    parser.add_argument("--queue-0", type=int, default=50_000, help="keys of class 0")
    parser.add_argument("--groups", type=int, default=0, help="u2pl.negative_groups; 0: the paper's own negatives")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--against", metavar="MODULE:FUNCTION", help="a second implementation")
    parser.add_argument("--against-layout", choices=["contiguous", "channels_last"], default="contiguous")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="ours, uncompiled")
    parser.add_argument("--share", action="store_true", help="also time the networks (a minute or two)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reuse_heap()
    sys.path.insert(0, ".")
    names = [f"ours, {arguments.groups or 'own'} negatives", *filter(None, [arguments.against])]
    shape = the_shape(arguments)
    print(f"{shape.classes} classes, {shape.images} + {shape.images} images, {shape.large} / {shape.small}, one thread")
    print(f"memory copy: {copy_rate():.1f} GB/s")
    built = {name: build(arguments, name) for name in names}
    cases, steps = ({name: pair[index] for name, pair in built.items()} for index in (0, 1))
    whole = 0.0
    for part, contrast in PARTS.items():
        times = interleaved(cases, steps, arguments.rounds, contrast=contrast)  # type: ignore[arg-type]
        report(times, part)
        whole = whole or statistics.median(times[names[0]])
    del built, cases, steps
    for name in names:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=peak_memory, args=(arguments, name, sender))
        process.start()
        print(f"{'peak memory':14} {name:24} {receiver.recv():7.0f} MB above the bank and the networks' outputs")
        process.join()
    if arguments.share:
        networks = full_step(arguments)
        print(f"share of a step of {(networks + whole) / 1e3:.0f} s on this CPU: {whole / (networks + whole):.2%}")


if __name__ == "__main__":
    main()
