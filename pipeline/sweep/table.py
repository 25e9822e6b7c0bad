"""How far trials are, read from their own records."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.checkpoint import METRICS_FILE
from pipeline.errors import UserError
from pipeline.sweep.trials import Trial
from pipeline.training.trackers import duration

FIRST = ("running", "failed", "stopped", "waiting", "done")
"""States in the order in which rows are shown when there is no room for all."""
NUMBERS = 46
"""Columns of the terminal that the cells beside a trial's name need."""


@dataclass
class TrialRow:
    """One trial's state and scores."""

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
    problem: str = ""
    """Why it failed."""

    def cells(self) -> tuple[str, ...]:
        """Name, state, steps, mIoU and time left, as text."""
        miou = "-" if self.miou is None else f"{100 * self.miou:.2f}"
        eta = duration(self.eta) if self.eta is not None and self.state == "running" else "-"
        return self.trial.name, self.state, f"{self.step}/{self.trial.config.optim.steps}", miou, eta


def look(row: TrialRow) -> None:
    """Updates a row from the trial's records. A record that cannot be read now is read the next time."""
    for record in _records(row.trial.out):
        row.step = record["step"]
        if record["kind"] == "eval":
            row.miou, row.eval_seconds = _miou(record), record.get("worker_seconds", 0.0)
        else:
            row.eta, row.images_per_second = record["eta_seconds"], record["images_per_second"]
            row.workers = record.get("workers", 0)


def evaluations(out: str) -> list[tuple[int, float]]:
    """Step and mIoU (0..1) of what a run has evaluated; empty if that cannot be read."""
    return [(record["step"], _miou(record)) for record in _records(out) if record["kind"] == "eval"]


def _records(out: str) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in storage.read_bytes(storage.join(out, METRICS_FILE)).splitlines()]
    except (UserError, OSError):
        return []


def _miou(record: Mapping[str, Any]) -> float:
    return next(iter(record["miou"].values()))


def summary(rows: Sequence[TrialRow], total: int) -> str:
    """How many of `total` are done, and how many failed."""
    states = [row.state for row in rows]
    return f"{states.count('done')} of {total} done" + f", {states.count('failed')} failed" * ("failed" in states)


def screen(rows: Sequence[TrialRow], total: int, columns: int, lines: int) -> list[str]:
    """The table cut to the terminal's size, so that the next one can overwrite it.

    Args:
        rows: of the trials that are known.
        total: how many trials there will be.
        columns: of the terminal.
        lines: of the terminal.
    """
    room, shown = max(1, lines - 4), rows  # beside heading, two lines at the end, and that of the cursor
    if len(rows) > room:
        wanted = sorted(range(len(rows)), key=lambda at: FIRST.index(rows[at].state))[:room]
        shown = [rows[at] for at in sorted(wanted)]
    cells = [(_shortened(name, columns - NUMBERS), *others) for name, *others in (row.cells() for row in shown)]
    more = [f"and {len(rows) - len(shown)} more"] * (len(shown) < len(rows))
    text = [*table([("trial", "state", "step", "mIoU", "eta"), *cells]), *more, summary(rows, total)]
    return [line[: columns - 1] for line in text]


def _shortened(name: str, width: int) -> str:
    half = max(4, width // 2 - 2)
    return name if len(name) <= max(width, 2 * half + 3) else f"{name[:half]}...{name[-half:]}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
