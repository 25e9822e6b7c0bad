"""What a comparison looks like: scores over the labeled share, learning curves, and what methods log of themselves.

Series are told apart by colour, dash and marker. Charts are drawn small, so that their text can be read where a phone
shows them at its width.
"""

import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from pipeline.report.compare import Comparison, MethodRow, Spread
from pipeline.report.runs import Run

Point = tuple[float, float]

COLOURS = ("#0072b2", "#c44601", "#00734f", "#9c3587", "#333333", "#8a6100")
"""Dark forms of the palette of Okabe and Ito: they differ for colour-blind eyes and stand out from white."""
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = "os^Dx"
WIDTH, HEIGHT = 3.9, 2.35
"""Of a chart without its legend, in inches: 375 pixels, the width of a phone."""
LABEL = 44
"""Characters of a label; the rest is cut."""
STYLE: dict[Any, Any] = {
    "font.size": 8, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "report",
    "axes.edgecolor": "#8b949e", "axes.linewidth": 0.8, "axes.grid": True, "grid.color": "#d0d4d9",
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "lines.linewidth": 1.3, "lines.markersize": 4, "text.color": "#1f2328", "text.parse_math": False,
}  # fmt: skip
FORMATS = ("pdf", "svg", "png")
"""Formats that `Chart.drawn` makes; text in an SVG stays text."""


@dataclass(frozen=True)
class Chart:
    """A drawing, and what it shows in words."""

    name: str
    """Of its file."""
    title: str
    text: str
    """Its main numbers, for those who do not see it."""
    caption: str
    figure: Figure

    def drawn(self, kind: str) -> bytes:
        """The drawing as a file of one of `FORMATS`; the same bytes for the same numbers."""
        buffer = io.BytesIO()
        stamp = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}[kind]
        with mpl.rc_context(STYLE):
            self.figure.savefig(buffer, format=kind, dpi=200, metadata=stamp)
        return buffer.getvalue()


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


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    points: Sequence[Point]
    ends: Sequence[Point] = ()
    """More marks without a line, such as each seed's last value."""


def charts(comparison: Comparison) -> Iterator[Chart]:
    """All charts of a comparison."""
    yield from filter(None, [overview(comparison)])
    for split in comparison.splits:
        yield from of_split(comparison, split)


def overview(comparison: Comparison) -> Chart | None:
    """Scores by labeled share; by row where there is one split only. None if no run is finished."""
    splits = [split for split in comparison.splits if any(row.last(split) for row in comparison.rows)]
    if len(splits) == 1:
        return _dots(comparison, splits[0])
    return _shares(comparison, {split: share for split in splits if (share := comparison.fraction(split))})


def of_split(comparison: Comparison, split: str) -> list[Chart]:
    """Validation mIoU over the steps, and each of `LOGGED` that a run on the split logged."""

    def scores(run: Run) -> list[Point]:
        return [(score.step, 100 * score.value) for score in run.scores()]

    title = f"Validation mIoU over steps, split {split}"
    caption = f"{title}; lines: mean over seeds, marks at the end: each seed."
    found = [_over_steps(f"miou-{split}", title, caption, "val mIoU, %", _series(comparison.rows, split, scores))]
    for each in LOGGED:
        series = _series(comparison.rows, split, lambda run, key=each.key: run.curve(key))
        caption = f"{each.title}; mean over seeds."
        found.append(_over_steps(f"{each.key}-{split}", each.title, caption, each.unit, series, lowest=0.0))
    return [chart for chart in found if chart]


def _dots(comparison: Comparison, split: str) -> Chart:
    """A line for each row: a filled dot with an error bar, and a ring."""
    rows = [
        (row.label, last, best) for row in comparison.rows if (last := row.last(split)) and (best := row.best(split))
    ]
    with mpl.rc_context(STYLE):
        figure, axes = _axes("val mIoU, %", "", 0.5 + 0.17 * len(rows))
        for place, (_, last, best) in enumerate(rows):
            axes.errorbar(last.mean, place, xerr=last.sd or 0, color=COLOURS[0], marker="o", capsize=0)
            axes.plot(best.mean, place, color=COLOURS[1], marker="o", markersize=7, fillstyle="none")
        axes.set_yticks(range(len(rows)), [_short(label) for label, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
    return Chart(
        f"overview-{split}",
        f"mIoU on split {split}",
        "; ".join(f"{label} {last.mean:.2f}" for label, last, _ in rows),
        f"Split {split}; dot: last evaluation with its standard deviation, ring: best.",
        figure,
    )


def _shares(comparison: Comparison, shares: dict[str, float]) -> Chart | None:
    if not shares:
        return None
    found: list[tuple[str, list[tuple[float, Spread]]]] = [
        (row.label, [(share, spread) for split, share in shares.items() if (spread := row.last(split))])
        for row in comparison.rows
    ]
    with mpl.rc_context(STYLE):
        figure, axes = _axes("labeled share of the images", "val mIoU, %", HEIGHT)
        for index, (label, spreads) in enumerate(found):
            x, y = [share for share, _ in spreads], [spread.mean for _, spread in spreads]
            axes.errorbar(x, y, yerr=[spread.sd or 0 for _, spread in spreads], label=_short(label), **_look(index))
        axes.set_xscale("log", base=2)
        names = ["full" if split == "full" else split.replace("_", "/") for split in shares]
        axes.xaxis.set_major_locator(FixedLocator(list(shares.values())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels(names)
        _legend(figure, [label for label, _ in found])
    ends = [Series(label, [(share, spread.mean) for share, spread in spreads]) for label, spreads in found]
    caption = "Last evaluation over the labeled share; bars: standard deviation over seeds."
    return Chart("overview", "mIoU over the labeled share", _said(ends), caption, figure)


def _series(rows: Sequence[MethodRow], split: str, curve: Callable[[Run], Sequence[Point]]) -> list[Series]:
    """One for each row, empty where it has nothing, so that a row looks the same in all charts."""
    series = []
    for row in rows:
        shown = row.finished(split) or row.of(split)
        found = [points for run in shown if (points := curve(run))]
        label = row.label if row.finished(split) or not shown else f"{row.label} (unfinished)"
        series.append(Series(label, _mean_curve(found), [points[-1] for points in found]))
    return series


def _mean_curve(found: Sequence[Sequence[Point]]) -> list[Point]:
    """Mean over curves at the steps that all of them have."""
    if not found:
        return []
    values = [dict(points) for points in found]
    common = sorted(set.intersection(*(set(each) for each in values)))
    return [(step, statistics.fmean(each[step] for each in values)) for step in common]


def _over_steps(
    name: str, title: str, caption: str, unit: str, series: Sequence[Series], lowest: float | None = None
) -> Chart | None:
    """A chart whose vertical axis reaches down to `lowest`, or to the lowest value; None without a point."""
    if not any(each.points or each.ends for each in series):
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _axes("step", unit, HEIGHT)
        for index, each in enumerate(series):
            look, every = _look(index), max(1, len(each.points) // 12)
            if each.points or each.ends:
                axes.plot(*_columns(each.points), label=_short(each.label), markevery=every, **look)
                axes.plot(*_columns(each.ends), **{**look, "linestyle": ""})
        axes.set_xlim(left=0)
        if lowest is not None:
            axes.set_ylim(bottom=lowest)
        _legend(figure, [each.label for each in series if each.points or each.ends])
    return Chart(name, title, _said(series), caption, figure)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _axes(x: str, y: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def _look(index: int) -> dict[str, Any]:
    """Colour, dash and marker of a series; sixty differ."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    """Keys below the chart, which grows by their lines."""
    columns = 1 if max(map(len, labels), default=0) > 22 else 2
    figure.set_figheight(HEIGHT + 0.17 * -(-len(labels) // columns))
    figure.legend(loc="outside lower left", ncols=columns, handlelength=3)


def _short(label: str) -> str:
    return label if len(label) <= LABEL else f"{label[: LABEL - 1]}…"


def _said(series: Sequence[Series]) -> str:
    ends = [f"{each.label} {each.points[-1][1]:.4g}" for each in series if each.points]
    return f"At the right end: {'; '.join(ends)}."
