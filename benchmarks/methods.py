"""What each method costs beside SupOnly, on one CPU thread: seconds per step and memory.

    python benchmarks/methods.py [--methods suponly,u2pl,...] [--backbone resnet18] [--crop 129] [--images 2]

Each method has a process of its own with the values of the preset `voc_classic`; all of them make one step in turn, so
that the ratios hold on a machine whose speed drifts. A step is forward, backward, optimiser and what follows it, on
images made by hand; reading and decoding are left out. Memory is the peak of the process above what it had before the
method was built: networks, optimiser, gradients, activations, banks.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installation, like the jobs

from pipeline.batch import Batch, Views
from pipeline.config.cli import resolve
from pipeline.config.methods import OPTIONS
from pipeline.config.schema import Config, merge, read_preset
from pipeline.methods import METHODS, Step, build_method
from pipeline.ops.world import World
from pipeline.training.optim import build_optimizer

CLASSES = 21
WARM = 2
"""Steps of each method that are thrown away."""


class Cost(NamedTuple):
    """What one method took."""

    seconds: list[float]
    """Of each step."""
    megabytes: float


def configured(arguments: argparse.Namespace, method: str) -> Config:
    """The preset with a network and a crop that a CPU can bear."""
    values = {
        "method": method,
        "data": {"crop": [arguments.crop] * 2},
        "model": {"backbone": arguments.backbone, "weights": "none"},
        "optim": {"batch_labeled": arguments.images, "batch_unlabeled": arguments.images},
        "cutmix_seg": {"batch_norm": "separate"},  # without weights there are no statistics to freeze
    }
    return resolve(merge(read_preset("voc_classic"), values), OPTIONS)


def make_views(count: int, size: int, strong: int, *, labeled: bool, classes: int = CLASSES) -> Views:
    """Noise over blocks of colour whose classes are their masks."""
    blocks = torch.randint(0, classes, (count, 1, 8, 8))
    mask = torch.nn.functional.interpolate(blocks.float(), (size, size)).long()[:, 0]
    image = (mask[:, None] * 9 + torch.randint(0, 60, (count, 3, size, size))).to(torch.uint8)
    views = tuple(image.flip(1) for _ in range(strong))
    ids = tuple(str(number) for number in range(count))
    return Views(image, mask if labeled else None, torch.ones_like(mask, dtype=torch.bool), ids, views, mask)


def serve(arguments: argparse.Namespace, name: str, connection: Connection) -> None:
    """In a process of its own: makes a step whenever it is asked to, and tells how long that took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = _megabytes("VmRSS")
    config = configured(arguments, name)
    method = build_method(config, CLASSES).train()
    optimizer = build_optimizer(method, config.optim)
    spec = method.views
    index = config.optim.steps // 2  # after every warm-up
    while connection.recv():
        labeled = make_views(arguments.images, arguments.crop, 0, labeled=True)
        unlabeled = make_views(arguments.images, arguments.crop, spec.strong, labeled=False) if spec.unlabeled else None
        began = time.perf_counter()
        step = Step(index, config.optim.steps, config.seed, World())
        total = torch.stack(list(method(Batch(labeled, unlabeled), step).terms.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        method.after_step(step)
        connection.send(time.perf_counter() - began)
        index += 1
    connection.send(_megabytes("VmHWM") - before)


def _megabytes(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure(arguments: argparse.Namespace, names: list[str]) -> dict[str, Cost]:
    """All methods, one step of each in turn."""
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    processes = []
    for name in names:
        ends[name], other = context.Pipe()
        processes.append(context.Process(target=serve, args=(arguments, name, other), daemon=True))
        processes[-1].start()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(WARM + arguments.rounds):
        for name, end in ends.items():
            end.send(True)
            spent = end.recv()
            if index >= WARM:
                seconds[name].append(spent)
        print(f"round {index + 1} of {WARM + arguments.rounds}", file=sys.stderr, flush=True)
    costs = {}
    for name, end in ends.items():
        end.send(False)
        costs[name] = Cost(seconds[name], end.recv())
    for process in processes:
        process.join()
    return costs


def report(costs: dict[str, Cost]) -> None:
    """A Markdown table; the ratio of times is the median of the rounds' ratios."""
    base = costs["suponly"]
    print("| method | s/step | x SupOnly | MB | x SupOnly |\n|---|---|---|---|---|")
    for name, cost in costs.items():
        ratio = statistics.median(own / other for own, other in zip(cost.seconds, base.seconds, strict=True))
        print(
            f"| `{name}` | {statistics.median(cost.seconds):.2f} | {ratio:.2f} "
            f"| {cost.megabytes:.0f} | {cost.megabytes / base.megabytes:.2f} |"
        )


def main() -> None:
    """Runs what the flags ask for and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="names, separated by commas (default: all)")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--crop", type=int, default=129, help="height and width of the images")
    parser.add_argument("--images", type=int, default=2, help="labeled images, and as many unlabeled ones")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    names = list(dict.fromkeys(["suponly", *arguments.methods.split(",")]))
    print(f"{arguments.backbone}, {arguments.images} + {arguments.images} images of {arguments.crop}, one thread\n")
    report(measure(arguments, names))


if __name__ == "__main__":
    main()
