"""What the steps of a log interval add up to: losses, speed, time left."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config.schema import Config
from pipeline.errors import RunError
from pipeline.ingest.loader import IngestStats, Loader
from pipeline.methods import Losses
from pipeline.ops.world import World
from pipeline.training.trackers import duration

_NEVER = 1 << 62
"""Stands for the step of the first non-finite loss while all are finite."""


class Diverged(RunError):
    """A loss, or what an update made of the network, is not finite."""


class Meter:
    """Sums what the steps report; looks at the device once per log interval."""

    def __init__(self, config: Config, world: World, loader: Loader, device: torch.device) -> None:
        self._config, self._world, self._loader, self._device = config, world, loader, device
        self._reset()

        self._last: tuple[int, tuple[str, ...]] = (-1, ())

    def _reset(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._logs: dict[str, Tensor] = {}
        self._steps = 0
        self._ids: dict[int, tuple[str, ...]] = {}
        self._bad = torch.full((), _NEVER, device=self._device)
        self._began = time.perf_counter()
        self._before = astuple(self._loader.stats)
        self._paused = 0.0

    def add(self, index: int, losses: Losses, batch: Batch) -> None:
        """Takes a step's losses without waiting for the device."""
        for name, value in losses.terms.items():
            self._terms[name] = self._terms.get(name, 0) + value.detach()
            self._bad = torch.where(value.detach().isfinite(), self._bad, self._bad.clamp_max(index))
        self._logs = losses.logs
        self._steps += 1
        self._ids[index] = batch.labeled.ids + (batch.unlabeled.ids if batch.unlabeled else ())
        self._last = index, self._ids[index]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block does not count as training."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

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

    def summary(self, step: int, lr: float) -> dict[str, Any]:
        """Means of the interval over steps and ranks, speed and time left; begins a new interval.

        Raises:
            Diverged: a loss was not finite; on every rank alike.
        """
        self.check()
        sums = self._world.sum(torch.stack(list(self._terms.values())).double()) / (self._world.size * self._steps)
        means = dict(zip(self._terms, sums.tolist(), strict=True))
        elapsed = time.perf_counter() - self._began - self._paused
        images = sum(map(len, self._ids.values())) * self._world.size
        record = {
            "total": sum(means.values()),
            "loss": means,
            "lr": lr,
            "workers": self._world.size,
            "images_per_second": round(images / elapsed, 2),
            "worker_seconds": round(elapsed * self._world.size, 3),
            "eta_seconds": round((self._config.optim.steps - step) * elapsed / self._steps, 1),
            **self._ingest(elapsed),
            **{name: value.tolist() for name, value in self._logs.items()},
        }
        self._reset()
        return record

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
        """The interval as one line of the console."""
        steps = self._config.optim.steps
        losses = "  ".join(f"{name} {value:.4f}" for name, value in record["loss"].items())
        kept = f"  kept {record['kept']:.0%}" if "kept" in record else ""
        speed = f"{record['images_per_second']:.1f} img/s  stall {record['stall']:.0%}"
        return (
            f"step {step:>6}/{steps}  loss {record['total']:.4f}  ({losses}){kept}  lr {record['lr']:.2e}  {speed}"
            f"  eta {duration(record['eta_seconds'])}"
        )
