"""How far trials are, as their own records tell."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.checkpoint import METRICS_FILE
from pipeline.errors import UserError
from pipeline.sweep.trials import Trial
from pipeline.training.trackers import duration


@dataclass
class Row:
    """How far a trial is."""

    trial: Trial
    state: str = "waiting"
    step: int = 0
    miou: float | None = None
    """Last evaluation, 0..1."""
    eta: float | None = None
    """Seconds."""
    images_per_second: float = 0.0
    """Of the newest record."""
    workers: int = 0
    """Of the newest record."""
    eval_seconds: float = 0.0
    """Of the newest evaluation, summed over the workers."""

    def cells(self) -> tuple[str, ...]:
        """As text."""
        miou = "-" if self.miou is None else f"{100 * self.miou:.2f}"
        eta = duration(self.eta) if self.eta is not None and self.state == "running" else "-"
        return self.trial.name, self.state, f"{self.step}/{self.trial.config.optim.steps}", miou, eta


def look(row: Row) -> None:
    """Reads how far a trial is; what cannot be read now is read the next time."""
    try:
        lines = storage.read_bytes(storage.join(row.trial.out, METRICS_FILE)).splitlines()
    except (UserError, OSError):
        return
    for record in map(json.loads, lines):
        row.step = record["step"]
        if record["kind"] == "eval":
            row.miou, row.eval_seconds = next(iter(record["miou"].values())), record.get("worker_seconds", 0.0)
        else:
            row.eta, row.images_per_second = record["eta_seconds"], record["images_per_second"]
            row.workers = record.get("workers", 0)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
