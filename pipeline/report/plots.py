"""What a comparison looks like: scores over the labeled share, learning curves, and what methods log of themselves."""

import statistics
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from pipeline.report.compare import Comparison, MethodRow
from pipeline.report.runs import Run
from pipeline.report.svg import Axis, Point, Series, dot_chart, line_chart, round_ticks


class Logged(NamedTuple):
    """A number that some methods log in training."""

    key: str
    title: str
    unit: str


LOGGED = (
    Logged("kept", "Unlabeled pixels that keep a pseudo-label", "share"),
    Logged("alpha", "alpha_t, the unreliable pixels", "share"),
    Logged("entropy_threshold", "gamma_t, the entropy from which a pixel is unreliable", "nats"),
    Logged("bank_fill", "Memory bank, filled part (mean over classes)", "share"),
)


def overview(comparison: Comparison, name: str) -> str:
    """Scores by labeled share; by row where there is one split only. HTML, empty if no run is finished.

    Args:
        comparison: the runs.
        name: unique on the page.
    """
    splits = [split for split in comparison.splits if any(row.last(split) for row in comparison.rows)]
    if len(splits) == 1:
        return _figure(
            _dots(comparison, splits[0], name),
            f"Split {splits[0]}; dot: last evaluation with its standard deviation, ring: best.",
        )
    drawn = {split: share for split in splits if (share := comparison.fraction(split))}
    return _figure(
        _fractions(comparison, drawn, name),
        "Last evaluation over the labeled share; bars: standard deviation over seeds.",
    )


def _dots(comparison: Comparison, split: str, name: str) -> str:
    rows = []
    for row in comparison.rows:
        last, best = row.last(split), row.best(split)
        if last and best:
            rows.append((row.label, (last.mean, best.mean), last.sd))
    ends = [value for _, (last, best), sd in rows for value in (last - (sd or 0), best, last + (sd or 0))]
    text = "; ".join(f"{label} {last:.2f}" for label, (last, _), _ in rows)
    return dot_chart(name, f"mIoU on split {split}", text, rows, Axis("val mIoU, %", round_ticks(ends)))


def _fractions(comparison: Comparison, shares: dict[str, float], name: str) -> str:
    series = []
    for row in comparison.rows:
        found = [(share, spread) for split, share in shares.items() if (spread := row.last(split))]
        points = [(share, spread.mean) for share, spread in found]
        series.append(Series(row.label, points, [spread.sd for _, spread in found]))
    if not shares:
        return ""
    ends = [y + sign * (bar or 0) for each in series for (_, y), bar in zip(each.points, each.bars, strict=True)
            for sign in (-1, 1)]  # fmt: skip
    ticks = [(share, "full" if split == "full" else split.replace("_", "/")) for split, share in shares.items()]
    x = Axis("labeled share of the images", ticks, log=True)
    return line_chart(
        name, "mIoU over the labeled share", _said(series), series, x, Axis("val mIoU, %", round_ticks(ends))
    )


def curves(comparison: Comparison, split: str, name: str) -> str:
    """Validation mIoU over the steps: each row's mean over its seeds, and each seed's last evaluation. HTML."""

    def scores(run: Run) -> list[Point]:
        return [(score.step, 100 * score.value) for score in run.scores()]

    series = _series(comparison.rows, split, scores)
    title = f"Validation mIoU over steps, split {split}"
    chart = _over_steps(name, title, "val mIoU, %", series)
    return _figure(chart, f"{title}; lines: mean over seeds, marks at the end: each seed.")


def internals(comparison: Comparison, split: str, name: str) -> list[str]:
    """A chart for each of `LOGGED` that a run on the split logged. HTML."""
    drawn = []
    for each in LOGGED:
        series = _series(comparison.rows, split, lambda run, key=each.key: run.curve(key))
        chart = _over_steps(f"{name}-{each.key.replace('_', '-')}", each.title, each.unit, series, lowest=0.0)
        drawn.append(_figure(chart, f"{each.title}; mean over seeds."))
    return [chart for chart in drawn if chart]


def _series(rows: Sequence[MethodRow], split: str, curve: Callable[[Run], Sequence[Point]]) -> list[Series]:
    """One for each row, empty where it has nothing, so that a row looks the same in all charts."""
    series = []
    for row in rows:
        shown = row.finished(split) or row.of(split)
        found = [points for run in shown if (points := curve(run))]
        label = row.label if row.finished(split) or not shown else f"{row.label} (unfinished)"
        series.append(Series(label, _mean_curve(found), ends=[points[-1] for points in found]))
    return series


def _mean_curve(found: Sequence[Sequence[Point]]) -> list[Point]:
    """Mean over curves at the steps that all of them have."""
    if not found:
        return []
    values = [dict(points) for points in found]
    common = sorted(set.intersection(*(set(each) for each in values)))
    return [(step, statistics.fmean(each[step] for each in values)) for step in common]


def _over_steps(name: str, title: str, unit: str, series: Sequence[Series], lowest: float | None = None) -> str:
    """A chart whose vertical axis reaches down to `lowest`, or to the lowest value."""
    points = [point for each in series for point in (*each.points, *each.ends)]
    if not points:
        return ""
    x = Axis("step", round_ticks([0, *(step for step, _ in points)]))
    values = [value for _, value in points] + ([] if lowest is None else [lowest])
    return line_chart(name, title, _said(series), series, x, Axis(unit, round_ticks(values)))


def _said(series: Sequence[Series]) -> str:
    ends = [f"{each.label} {each.points[-1][1]:.4g}" for each in series if each.points]
    return f"At the right end: {'; '.join(ends)}."


def _figure(chart: str, caption: str) -> str:
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>\n" if chart else ""
