"""Where a loss rose all at once: what a mean over seeds in a chart hides."""

import statistics

from pipeline.report.compare import Comparison
from pipeline.report.render import Table
from pipeline.report.runs import Run

AROUND = 3
"""Records on either side that a loss is compared with."""
FACTOR = 2.0
"""A spike is more than this times the median of those before, and of those after: a term that begins stays."""
SHARE = 0.1
"""And higher than that by at least this share of the total, so that noise of a small term is none."""
SHOWN = 12


def spikes(comparison: Comparison) -> Table:
    """The spikes of all runs, the highest first; a record is a mean over the steps since the one before."""
    found = [
        (
            value / before,
            [row.label, run.config.split, str(run.config.seed), name, f"{step:g}", f"{value:.4g}", f"{before:.4g}"],
        )
        for row in comparison.rows
        for run in row.runs
        for name in run.losses
        for step, value, before in _of_loss(run, name)
    ]
    found.sort(key=lambda each: -each[0])
    more = f", the {SHOWN} highest of {len(found)}" if len(found) > SHOWN else ""
    title = f"Loss spikes{more}: a logged mean above {FACTOR:g} times the median of the {AROUND} on either side"
    columns = ("method", "split", "seed", "loss", "step", "value", "before")
    return Table(title, columns, [cells for _, cells in found[:SHOWN]])


def _of_loss(run: Run, name: str) -> list[tuple[float, float, float]]:
    """Step, value, and the median of the records before, of each spike."""
    curve, total = run.curve(f"loss.{name}"), dict(run.curve("total"))
    found = []
    for at in range(AROUND, len(curve)):
        step, value = curve[at]
        before = statistics.median(each for _, each in curve[at - AROUND : at])
        after = [each for _, each in curve[at + 1 : at + 1 + AROUND]]
        falls = not after or value > FACTOR * statistics.median(after)
        if falls and value > FACTOR * before > 0 and value - before > SHARE * total[step]:
            found.append((step, value, before))
    return found
