"""Charts over the steps of training: scores, losses, learning rate, speed, and what methods log of themselves."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import matplotlib as mpl

from pipeline.report.compare import Comparison, MethodRow
from pipeline.report.plots import (
    HEIGHT,
    STYLE,
    Chart,
    Point,
    add_legend,
    add_values,
    columns,
    look,
    new_axes,
    said,
    short,
)
from pipeline.report.runs import Run

MARKS = 12
"""Markers on a line, about."""
HOVERED = 60
"""Points of a line that tell their value on hover, about."""
TOGETHER = 3
"""Labels that a merged line names."""


class Logged(NamedTuple):
    """A number that training logs."""

    key: str
    title: str
    unit: str


LOGGED = (
    Logged("lr", "Learning rate of the encoder", "learning rate"),
    Logged("images_per_second", "Speed", "images/s"),
    Logged("stall", "Time that steps wait for images", "share"),
    Logged("kept", "Unlabeled pixels that keep a pseudo-label", "share"),
    Logged("alpha", "alpha_t, the unreliable pixels", "share"),
    Logged("entropy_threshold", "gamma_t, the entropy from which a pixel is unreliable", "nats"),
    Logged("bank_fill", "Memory bank, filled part (mean over classes)", "share"),
)


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    place: int
    """Its row, which looks the same in all charts."""
    points: Sequence[Point]
    """Mean over seeds, at the steps that all of them have."""
    ends: Sequence[Point]
    """Each seed's last value."""


@dataclass(frozen=True)
class Curves:
    """What one chart would show."""

    name: str
    title: str
    unit: str
    lowest: float | None
    """Where the vertical axis begins; None: at the lowest value."""
    series: Sequence[Series]

    @property
    def flat(self) -> bool:
        """Whether no line of it ever changes, so that a chart would show nothing."""
        return all(len({y for _, y in each.points}) <= 1 for each in self.series)

    @property
    def seeds(self) -> str:
        """Over how many seeds its lines are."""
        counts = sorted({len(each.ends) for each in self.series})
        fewest, most = counts[0], counts[-1]
        if most == 1:
            return "one seed"
        return f"mean over {fewest} to {most} seeds" if fewest < most else f"mean over {most} seeds"


def of_split(comparison: Comparison, split: str) -> list[Chart]:
    """Charts of what runs on a split logged, without those in which nothing changes (`constant`)."""
    return [_chart(each) for each in _curves(comparison, split) if not each.flat]


def constant(comparison: Comparison, split: str) -> str:
    """What is not drawn, as it has one value in each row; empty if there is nothing."""
    named = []
    for each in _curves(comparison, split):
        values = {y for line in each.series for _, y in line.points}
        if each.flat:
            named.append(f"{each.title} ({values.pop():.4g})" if len(values) == 1 else each.title)
    return f"Not drawn, as it does not change: {'; '.join(named)}." if named else ""


def _curves(comparison: Comparison, split: str) -> Iterator[Curves]:
    """All that runs on a split logged: scores, losses, and each of `LOGGED`."""
    rows = comparison.rows
    parts = list(dict.fromkeys(name for row in rows for run in row.of(split) for name in run.losses))
    losses = [Logged(f"loss.{name}", f"Loss: {name}", "loss") for name in parts]
    losses = [Logged("total", "Loss: total", "loss"), *losses] if len(losses) > 1 else losses
    found = [Curves(f"miou-{split}", "Validation mIoU", "val mIoU, %", None, _series(rows, split, _scores))]
    for each in (*losses, *LOGGED):
        series = _series(rows, split, lambda run, key=each.key: run.curve(key))
        found.append(Curves(f"{each.key.replace('.', '-')}-{split}", each.title, each.unit, 0.0, series))
    yield from (each for each in found if each.series)


def _scores(run: Run) -> list[Point]:
    return [(score.step, 100 * score.value) for score in run.scores()]


def _series(rows: Sequence[MethodRow], split: str, curve: Callable[[Run], Sequence[Point]]) -> list[Series]:
    """One for each row that has something; rows with the same numbers, such as one schedule, share theirs."""
    series: list[Series] = []
    for place, row in enumerate(rows):
        shown = row.finished(split) or row.of(split)
        if found := [points for run in shown if (points := curve(run))]:
            label = row.label if row.finished(split) else f"{row.label} (unfinished)"
            series.append(Series(label, place, _mean_curve(found), [points[-1] for points in found]))
    return _merged(series)


def _merged(series: Sequence[Series]) -> list[Series]:
    groups: dict[str, list[Series]] = {}
    for each in series:  # means over other numbers of seeds may differ in their last digits
        groups.setdefault(" ".join(f"{x:g},{y:.6g}" for x, y in (*each.points, *sorted(set(each.ends)))), []).append(
            each
        )
    return [replace(group[0], label=_names(group, len(series))) for group in groups.values()]


def _names(group: Sequence[Series], rows: int) -> str:
    labels = [each.label for each in group]
    if len(labels) > TOGETHER:
        return f"all {rows} rows" if len(labels) == rows else f"{labels[0]} and {len(labels) - 1} more"
    return ", ".join(labels)


def _mean_curve(found: Sequence[Sequence[Point]]) -> list[Point]:
    """Mean over curves at the steps that all of them have."""
    values = [dict(points) for points in found]
    common = sorted(set.intersection(*(set(each) for each in values)))
    return [(step, statistics.fmean(each[step] for each in values)) for step in common]


def _chart(curves: Curves) -> Chart:
    values = []
    with mpl.rc_context(STYLE):
        figure, axes = new_axes("step", curves.unit, HEIGHT)
        for each in curves.series:
            style, every = look(each.place), max(1, len(each.points) // MARKS)
            axes.plot(*columns(each.points), label=short(each.label), markevery=every, **style)
            axes.plot(*columns(each.ends), **{**style, "linestyle": ""})
            shown = each.points[:: max(1, len(each.points) // HOVERED)]
            values.append(add_values(axes, shown, [f"{each.label}, step {x:g}: {y:.4g}" for x, y in shown]))
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=curves.lowest)
        add_legend(figure, [each.label for each in curves.series])
    seeds = curves.seeds.capitalize() if len(curves.series) > 1 else f"{curves.series[0].label}, {curves.seeds}"
    ends = "" if curves.seeds == "one seed" else "; marks at the end: each seed"
    text = said([(each.label, each.points[-1][1]) for each in curves.series if each.points])
    return Chart(curves.name, curves.title, text, f"{seeds}{ends}.", figure, values)
