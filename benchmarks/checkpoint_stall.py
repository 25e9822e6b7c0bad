"""For how long training stands still for a checkpoint: written by the training thread itself, and by another one.

    python benchmarks/checkpoint_stall.py [--rounds 9] [--backbone resnet18] [--queue 3000]

`Trainer.save` of U2PL's state on the VOC preset, into a folder of temporary files; the two ways take turns. `itself`
waits until the checkpoint is written, from tensors that are not copied before. `another` goes on after the copy, does
small operations until the file is written, and gives the longest time between two of them: that is how much the
writing holds up a thread that launches kernels. Everything runs on one thread of torch.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installation, like the jobs

import torch

from benchmarks.device_step import bare_trainer, case
from pipeline.checkpoint import STATE_FILE, Progress, name
from pipeline.methods import build_method
from pipeline.training import trainer
from pipeline.training.runtime import PlainRuntime
from pipeline.training.trainer import Trainer


def state_keeper(backbone: str, queue: int, out: str) -> Any:
    """A trainer that can do no more than save; its momentum is there as after a step."""
    values = {"model.backbone": backbone, "u2pl.queue": queue, "u2pl.queue_background": queue}
    config = case("u2pl", "voc_classic", **values)
    method = build_method(config, 21)
    bare = bare_trainer(config, method, torch.device("cpu"))
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter)
    bare.optimizer.step()
    bare.runtime, bare.progress, bare.data, bare.about = PlainRuntime(out), Progress(1), dict, dict
    bare.runtime.attempt.take()
    bare._writer = partial(Trainer._writer, bare)
    return bare


def itself(bare: Any) -> float:
    """Seconds until the checkpoint is written."""
    with patch.object(trainer, "snapshot", lambda state: lambda: state):
        began = time.perf_counter()
        Trainer.save(bare, False)
        bare.runtime.drain()
        return time.perf_counter() - began


def another(bare: Any) -> tuple[float, float]:
    """Seconds until training goes on, and the longest ones between two operations until the checkpoint is written."""
    began = last = time.perf_counter()
    Trainer.save(bare, False)
    stood, gap, x = time.perf_counter() - began, 0.0, torch.zeros(1)
    last = time.perf_counter()
    while not bare.runtime._writing.done():
        x.add_(1.0)
        now = time.perf_counter()
        gap, last = max(gap, now - last), now
    bare.runtime.drain()
    return stood, gap


def main() -> None:
    """Prints a line a round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--queue", type=int, default=3000, help="keys of each class in the memory bank")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bare = state_keeper(arguments.backbone, arguments.queue, folder)
        rows = [(itself(bare), *another(bare)) for _ in range(arguments.rounds + 1)][1:]  # the first one warms up
        size = Path(folder, name(1), STATE_FILE).stat().st_size
    for alone, stood, gap in rows:
        print(f"itself {1e3 * alone:7.0f} ms   another {1e3 * stood:6.0f} ms   longest gap {1e3 * gap:5.0f} ms")
    ratio = statistics.median(alone / stood for alone, stood, _ in rows)
    alone, stood, gap = (1e3 * statistics.median(column) for column in zip(*rows, strict=True))
    print(f"{size / 1e6:.0f} MB: itself {alone:.0f} ms, another {stood:.0f} ms: {ratio:.1f} times; gap {gap:.0f} ms")


if __name__ == "__main__":
    main()
