"""What the steps of a log interval add up to: losses, speed, time left."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config.schema import Config
from pipeline.errors import Diverged
from pipeline.ingest.loader import IngestStats, Loader
from pipeline.methods import Losses
from pipeline.ops.world import World
from pipeline.training.trackers import duration

log = logging.getLogger(__name__)
MOST_SKIPPED = 20
"""Updates left out in a row after which a run has diverged."""
RECENT = 0.3
"""Weight of the last interval in the running mean of a step's time."""
TOLD_SECONDS = 0.1
"""For which training must stand still for checkpoints before the console says so."""
_NEVER = 1 << 62
"""Stands for the step of the first non-finite loss while all are finite."""


class Meter:
    """Sums what the steps report; looks at the device after the first step and once per log interval."""

    def __init__(self, config: Config, world: World, loader: Loader, device: torch.device) -> None:
        self._config, self._world, self._loader, self._device = config, world, loader, device
        self._reset()
        self._last: tuple[int, tuple[str, ...]] = (-1, ())
        self._row = 0
        self._cold = (0.0, 0)
        self._pace: float | None = None
        self.stood_still = 0.0
        """Seconds that this rank's training spent on handing checkpoints over, in all."""

    def _reset(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._logs: dict[str, Tensor] = {}
        self._steps = self._skipped = 0
        self._ids: dict[int, tuple[str, ...]] = {}
        self._bad = torch.full((), _NEVER, device=self._device)
        self._began = time.perf_counter()
        self._before = astuple(self._loader.stats)
        self._paused = self._saving = 0.0

    def add(self, index: int, losses: Losses | None, batch: Batch) -> None:
        """Takes a step's losses without waiting for the device.

        Args:
            index: of the step.
            losses: None: the update was left out, as the gradient was not finite.
            batch: of this rank.

        Raises:
            Diverged: so many updates in a row were left out; on every rank alike.
        """
        self._steps += 1
        self._ids[index] = batch.labeled.ids + (batch.unlabeled.ids if batch.unlabeled else ())
        self._last = index, self._ids[index]
        if losses is None:
            self._skip(index)
            return
        self._row = 0
        for name, value in losses.terms.items():
            self._terms[name] = self._terms.get(name, 0) + value.detach()
            self._bad = torch.where(value.detach().isfinite(), self._bad, self._bad.clamp_max(index))
        self._logs = losses.logs

    def _skip(self, index: int) -> None:
        self._skipped += 1
        self._row += 1
        log.warning("step %d: the gradient is not finite; the network stays as it was", index)
        if self._row == MOST_SKIPPED:
            raise Diverged(
                f"the gradients of {self._row} steps in a row, up to step {index}, are not finite; this rank's "
                f"samples: {', '.join(self._ids[index])}"
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block does not count as training."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The block hands a checkpoint over, or waits for one."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self._saving += spent
            self.stood_still += spent

    def check(self) -> None:
        """Stops the run if a loss of the interval was not finite; every rank calls it.

        Raises:
            Diverged: one was not, on any rank; on every rank alike.
        """
        first = int(self._world.gather(self._bad.view(1)).min())
        if first != _NEVER:
            raise Diverged(f"a loss is not finite at step {first}; this rank's samples: {', '.join(self._ids[first])}")

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Stops the run if a parameter or buffer is not finite, as a finite loss may have an infinite gradient.

        Waits for the device; every rank calls it before a checkpoint, which must be one that can be resumed.

        Args:
            state: the method's, after the last step; the same names on every rank.

        Raises:
            Diverged: one is not, on any rank; on every rank alike.
        """
        floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()])
        everywhere = self._world.gather(finite.to(torch.uint8)).amin(0).tolist()
        bad = [name for name, good in zip(floats, everywhere, strict=True) if not good]
        if bad:
            index, ids = self._last
            more = f" and {len(bad) - 1} more tensors are" if len(bad) > 1 else " is"
            raise Diverged(f"{bad[0]}{more} not finite after step {index}; this rank's samples: {', '.join(ids)}")

    def first(self, step: int, lr: float) -> dict[str, Any]:
        """The first step by itself; the interval goes on.

        It has no time left: this step waits for data and compiles, the others do not.

        Raises:
            Diverged: a loss was not finite; on every rank alike.
        """
        record = self._means(lr)
        self._cold = self._elapsed(), self._steps
        return record

    def summary(self, step: int, lr: float) -> dict[str, Any]:
        """Means of the interval over steps and ranks, speed and time left; begins a new interval.

        Raises:
            Diverged: a loss was not finite; on every rank alike.
        """
        record = self._means(lr)
        record["eta_seconds"] = round((self._config.optim.steps - step) * self._seconds_per_step(), 1)
        self._reset()
        return record

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began - self._paused

    def _seconds_per_step(self) -> float:
        """The running mean over intervals, without the first step of all unless there is no other."""
        seconds, steps = (now - cold for now, cold in zip((self._elapsed(), self._steps), self._cold, strict=True))
        self._cold = (0.0, 0)
        if not steps:
            return self._elapsed() / self._steps
        self._pace = seconds / steps if self._pace is None else self._pace + RECENT * (seconds / steps - self._pace)
        return self._pace

    def _means(self, lr: float) -> dict[str, Any]:
        """Means of the interval over steps and ranks, and speed."""
        self.check()
        updates = self._steps - self._skipped
        sums = self._world.sum(torch.stack([*self._terms.values()]).double()).tolist() if updates else []
        means = {name: total / (self._world.size * updates) for name, total in zip(self._terms, sums, strict=True)}
        elapsed = self._elapsed()
        images = sum(map(len, self._ids.values())) * self._world.size
        return {
            "total": sum(means.values()) if means else math.nan,
            "loss": means,
            "lr": lr,
            "workers": self._world.size,
            "images_per_second": round(images / elapsed, 2),
            "worker_seconds": round(elapsed * self._world.size, 3),
            **({"updates_left_out": self._skipped} if self._skipped else {}),
            **({"checkpoint_stall": round(self._saving, 3)} if self._saving else {}),
            **self._ingest(elapsed),
            **{name: value.tolist() for name, value in self._logs.items()},
        }

    def _ingest(self, elapsed: float) -> dict[str, Any]:
        """What the loaders of all ranks report: rates of the interval, and counts since the start of this attempt."""
        now = astuple(self._loader.stats)
        pairs = torch.tensor([now, [a - b for a, b in zip(now, self._before, strict=True)]], dtype=torch.float64)
        total, interval = (IngestStats(*row) for row in self._world.sum(pairs.to(self._device)).tolist())
        return {
            "stall": round(interval.stalled / elapsed / self._world.size, 3),
            "bytes_per_second": round(interval.encoded / elapsed),
            "decode_ms": round(1e3 * interval.decoding / max(1, interval.samples), 3),
            "retries": int(total.retries),
            "skipped": int(total.skipped),
        }

    def line(self, step: int, record: dict[str, Any]) -> str:
        """The interval, or the first step, as one line of the console."""
        steps = self._config.optim.steps
        losses = "  ".join(f"{name} {value:.4f}" for name, value in record["loss"].items())
        kept = f"  kept {record['kept']:.0%}" if "kept" in record else ""
        speed, stood = f"{_speed(record)}  stall {record['stall']:.0%}", record.get("checkpoint_stall", 0.0)
        if stood >= TOLD_SECONDS:
            speed += f"  checkpoint {stood:.1f} s"
        return (
            f"step {step:>6}/{steps}  loss {record['total']:.4f}  ({losses}){kept}  lr {record['lr']:.2e}  {speed}"
            f"{_eta(record)}"
        )

    def brief(self, record: dict[str, Any]) -> str:
        """The same beside a bar."""
        return f"loss {record['total']:.4f}  {_speed(record)}{_eta(record)}"


def _speed(record: dict[str, Any]) -> str:
    return f"{record['images_per_second']:.1f} img/s"


def _eta(record: dict[str, Any]) -> str:
    return f"  eta {duration(record['eta_seconds'])}" if "eta_seconds" in record else ""
