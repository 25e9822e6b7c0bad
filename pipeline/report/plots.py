"""How charts look, and the charts of scores: over the labeled share, by row, and by how sure a network is.

Series are told apart by colour, dash and marker. Charts are drawn small, so that their text can be read where a phone
shows them at its width.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from pipeline.report.compare import Comparison, Spread
from pipeline.report.inline import inline_svg

if TYPE_CHECKING:
    from pipeline.inference.measures import Bin  # needs torch, which a comparison does not wait for

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
    values: Sequence["Values"] = ()

    def inline(self) -> Markup:
        """The drawing as part of a page, whose points tell their values where a mouse rests on them."""
        for line, _ in self.values:
            line.set_visible(True)
        drawn = self.drawn("svg")
        for line, _ in self.values:
            line.set_visible(False)
        titles = {str(line.get_gid()): texts for line, texts in self.values}
        return inline_svg(drawn, self.name, f"{self.title}. {self.text}", titles)

    def drawn(self, kind: str) -> bytes:
        """The drawing as a file of one of `FORMATS`; the same bytes for the same numbers."""
        buffer = io.BytesIO()
        stamp = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}[kind]
        with mpl.rc_context(STYLE):
            self.figure.savefig(buffer, format=kind, dpi=200, metadata=stamp)
        return buffer.getvalue()


class Values(NamedTuple):
    """Points that a page tells on hover."""

    line: Line2D
    """Marks without colour, hidden in files."""
    texts: Sequence[str]
    """One a point."""


def add_values(axes: Axes, points: Sequence[Point], texts: Sequence[str]) -> Values:
    """Adds points that tell a text each."""
    (line,) = axes.plot(*columns(points), linestyle="", marker="o", markersize=10, alpha=0, visible=False)
    line.set_gid(f"values-{len(axes.lines)}")
    return Values(line, texts)


def said(ends: Sequence[tuple[str, float]]) -> str:
    """The last values of series, in words."""
    return f"At the right end: {'; '.join(f'{label} {value:.4g}' for label, value in ends)}."


def columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """The x and the y of points."""
    return [x for x, _ in points], [y for _, y in points]


def new_axes(x: str, y: str, height: float) -> tuple[Figure, Axes]:
    """A figure of a height in inches with one pair of axes; x and y are what stands beside them."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def look(index: int) -> dict[str, Any]:
    """Colour, dash and marker of a series; sixty differ."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def add_legend(figure: Figure, labels: Sequence[str]) -> None:
    """Keys below the chart, which grows by their lines; none for one series, which the caption names."""
    if len(labels) < 2:
        return
    columns = 1 if max(map(len, labels), default=0) > 22 else 2
    figure.set_figheight(HEIGHT + 0.17 * -(-len(labels) // columns))
    figure.legend(loc="outside lower left", ncols=columns, handlelength=3)


def short(label: str) -> str:
    """A label as legends and axes show it."""
    return label if len(label) <= LABEL else f"{label[: LABEL - 1]}…"


def overview(comparison: Comparison) -> Chart | None:
    """Scores by labeled share; by row where there is one split only. None if no run is finished."""
    splits = [split for split in comparison.splits if any(row.last(split) for row in comparison.rows)]
    if len(splits) == 1:
        return _dots(comparison, splits[0])
    return _shares(comparison, {split: share for split in splits if (share := comparison.fraction(split))})


def calibration(name: str, bins: Sequence["Bin"]) -> Chart:
    """How often a network is right by how sure it is, beside the line of one that is as right as it is sure.

    Args:
        name: of the network.
        bins: of its pixels; empty ones are left out.
    """
    shown, pixels = [each for each in bins if each.pixels], sum(each.pixels for each in bins)
    texts = [f"confidence {each.confidence:.3f}: accuracy {each.accuracy:.3f}" for each in shown]
    points = [(each.confidence, each.accuracy) for each in shown]
    with mpl.rc_context(STYLE):
        figure, axes = new_axes("confidence", "accuracy", WIDTH * 0.8)
        axes.plot([0, 1], [0, 1], color="#8b949e", linestyle=DASHES[1])
        axes.bar([each.confidence for each in shown], [each.pixels / pixels for each in shown], 0.03, color="#d0d4d9")
        axes.plot(*columns(points), **look(0))
        values = [add_values(axes, points, texts)]
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
    return Chart(
        f"reliability-{name}",
        f"Reliability of the {name}",
        "; ".join(texts),
        "Accuracy over confidence, both the mean of a bin; dashes: as right as sure; grey: share of the pixels.",
        figure,
        values,
    )


def _dots(comparison: Comparison, split: str) -> Chart:
    """A line for each row: a filled dot with an error bar, and a ring."""
    rows = [
        (row.label, last, best) for row in comparison.rows if (last := row.last(split)) and (best := row.best(split))
    ]
    values = []
    with mpl.rc_context(STYLE):
        figure, axes = new_axes("val mIoU, %", "", 0.5 + 0.17 * len(rows))
        for place, (_, last, best) in enumerate(rows):
            axes.errorbar(last.mean, place, xerr=last.sd or 0, color=COLOURS[0], marker="o", capsize=0)
            axes.plot(best.mean, place, color=COLOURS[1], marker="o", markersize=7, fillstyle="none")
            values.append(
                add_values(axes, [(last.mean, place)], [f"{rows[place][0]}: {last.mean:.2f}, best {best.mean:.2f}"])
            )
        axes.set_yticks(range(len(rows)), [short(label) for label, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
    return Chart(
        f"overview-{split}",
        f"mIoU on split {split}",
        "; ".join(f"{label} {last.mean:.2f}" for label, last, _ in rows),
        "Dot: last evaluation with its standard deviation over seeds, ring: best.",
        figure,
        values,
    )


def _shares(comparison: Comparison, shares: dict[str, float]) -> Chart | None:
    if not shares:
        return None
    found: list[tuple[str, list[tuple[float, Spread]]]] = [
        (row.label, [(share, spread) for split, share in shares.items() if (spread := row.last(split))])
        for row in comparison.rows
    ]
    values = []
    with mpl.rc_context(STYLE):
        figure, axes = new_axes("labeled share of the images", "val mIoU, %", HEIGHT)
        for index, (label, spreads) in enumerate(found):
            x, y = [share for share, _ in spreads], [spread.mean for _, spread in spreads]
            axes.errorbar(x, y, yerr=[spread.sd or 0 for _, spread in spreads], label=short(label), **look(index))
            points = list(zip(x, y, strict=True))
            values.append(add_values(axes, points, [f"{label}, share {each:.3g}: {mean:.2f}" for each, mean in points]))
        axes.set_xscale("log", base=2)
        names = ["full" if split == "full" else split.replace("_", "/") for split in shares]
        axes.xaxis.set_major_locator(FixedLocator(list(shares.values())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels(names)
        add_legend(figure, [label for label, _ in found])
    text = said([(label, spreads[-1][1].mean) for label, spreads in found if spreads])
    alone = f"{found[0][0]}, " if len(found) == 1 else ""
    caption = f"{alone}last evaluation; bars: standard deviation over seeds."
    return Chart("overview", "mIoU over the labeled share", text, caption, figure, values)
