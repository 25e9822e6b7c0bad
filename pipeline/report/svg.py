"""Charts as inline SVG: told apart by colour, dash and marker, described for those who do not see them.

Drawn small, so that their text can be read where a phone shows them at its width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

COLOURS = ("#0072b2", "#c44601", "#00734f", "#9c3587", "#333333", "#8a6100")
"""Dark forms of the palette of Okabe and Ito: they differ for colour-blind eyes and stand out from white."""
DASHES = ("", "7 3", "2 2.5", "9 2.5 2 2.5")
MARKS = 5
WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 18, 10, 40
TEXT = 11
LETTER = 6.0
"""Width of a letter of the text, about."""
KEY = 26
"""Width of a line in the legend."""
LINE = 16
FLAT = 0.02
"""Smallest range of an axis, as a share of its values: rounding errors do not look like mountains."""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    points: Sequence[Point]
    bars: Sequence[float | None] = ()
    """Half the height of each point's error bar, or none."""
    ends: Sequence[Point] = ()
    """More marks without a line, such as each seed's last value."""


@dataclass(frozen=True)
class Axis:
    """One direction of a chart: its name with the unit, and where the named ticks are."""

    title: str
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, low: float, high: float) -> Callable[[float], float]:
        """The way from a value to pixels between `low` and `high`."""
        first, last = (self._scaled(self.ticks[end][0]) for end in (0, -1))
        room = last - first or 1.0
        return lambda value: low + (high - low) * (self._scaled(value) - first) / room

    def _scaled(self, value: float) -> float:
        return math.log2(value) if self.log else value


def round_ticks(values: Sequence[float], count: int = 5) -> list[tuple[float, str]]:
    """About `count` round numbers that enclose `values`."""
    low, high = min(values), max(values)
    rough = max(high - low, FLAT * abs(high), 1e-9) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.floor(low / step + 1e-9), max(math.ceil(high / step - 1e-9), math.floor(low / step) + 1)
    return [(index * step, f"{index * step:.{places}f}") for index in range(first, last + 1)]


def line_chart(name: str, title: str, text: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Lines with markers, error bars and a legend.

    Args:
        name: unique on the page.
        title: what it shows.
        text: the same in a sentence or two with its main numbers.
        series: styled by their place; those without points only take theirs.
        x: axis whose first and last tick are the chart's borders.
        y: the same.
    """
    across, down = x.place(LEFT, WIDTH - RIGHT), y.place(HEIGHT - BOTTOM, TOP)
    legend, depth = _legend(series)
    drawn = "".join(_drawn(index, each, across, down) for index, each in enumerate(series))
    return _svg(name, title, text, HEIGHT + depth, _axes(x, y, across, down) + drawn + legend)


def dot_chart(name: str, title: str, text: str, rows: Sequence[tuple[str, Point, float | None]], x: Axis) -> str:
    """A line for each row: a filled dot with an error bar, and a ring.

    Args:
        name: unique on the page.
        title: what it shows.
        text: the same in a sentence.
        rows: label, values of dot and ring, half the length of the bar.
        x: axis whose first and last tick are the chart's borders.
    """
    left = min(16 + LETTER * max(len(label) for label, *_ in rows), WIDTH / 2)
    across, foot = x.place(left, WIDTH - RIGHT), TOP + LINE * len(rows)
    parts = [_grid_line(across(value), TOP, across(value), foot) for value, _ in x.ticks]
    parts += [_text(across(value), foot + 14, label, "middle") for value, label in x.ticks]
    parts.append(_text((left + WIDTH - RIGHT) / 2, foot + 30, x.title, "middle"))
    for index, (label, (dot, ring), bar) in enumerate(rows):
        middle = TOP + LINE * (index + 0.5)
        parts.append(_text(left - 8, middle + 4, _short(label, left - 12), "end"))
        if bar:
            parts.append(_stroke(across(dot - bar), middle, across(dot + bar), middle, COLOURS[0], 2))
        parts.append(f'<circle cx="{across(ring):.1f}" cy="{middle:.1f}" r="5" fill="none" stroke="{COLOURS[1]}"/>')
        parts.append(f'<circle cx="{across(dot):.1f}" cy="{middle:.1f}" r="3" fill="{COLOURS[0]}"/>')
    return _svg(name, title, text, foot + BOTTOM, "".join(parts))


def _svg(name: str, title: str, text: str, height: float, body: str) -> str:
    return (
        f'<svg role="img" aria-labelledby="{name}-title {name}-text" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-size="{TEXT}" fill="#1f2328"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(text)}</desc>{body}</svg>\n'
    )


def _axes(x: Axis, y: Axis, across: Callable[[float], float], down: Callable[[float], float]) -> str:
    foot = HEIGHT - BOTTOM
    parts = [_grid_line(LEFT, down(value), WIDTH - RIGHT, down(value)) for value, _ in y.ticks]
    parts += [_text(LEFT - 6, down(value) + 4, label, "end") for value, label in y.ticks]
    parts += [_grid_line(across(value), foot, across(value), foot + 4) for value, _ in x.ticks]
    parts += [_text(across(value), foot + 16, label, "middle") for value, label in x.ticks]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, foot + 32, x.title, "middle"))
    turned = f'transform="rotate(-90)" x="{-(TOP + foot) / 2:.0f}" y="10" text-anchor="middle"'
    return "".join(parts) + f"<text {turned}>{escape(y.title)}</text>"


def _drawn(index: int, series: Series, across: Callable[[float], float], down: Callable[[float], float]) -> str:
    places = [(across(x), down(y)) for x, y in series.points]
    parts = []
    for (x, _), (_, value), bar in zip(places, series.points, series.bars, strict=False):
        if bar:
            parts.append(_stroke(x, down(value - bar), x, down(value + bar), _colour(index), 1))
    if len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" {_style(index)}/>')
    marked = [*places[:: max(1, len(places) // 12)], *((across(x), down(y)) for x, y in series.ends)]
    return "".join([*parts, *(_mark(index, x, y) for x, y in marked)])


def _legend(series: Sequence[Series]) -> tuple[str, float]:
    """Keys in lines below the chart, and the height that they need."""
    parts, x, top = [], float(LEFT), float(HEIGHT)
    for index, each in enumerate(series):
        if not each.points and not each.ends:
            continue
        label = _short(each.label, WIDTH - LEFT - KEY - 10)
        width = KEY + LETTER * len(label) + 12
        if x > LEFT and x + width > WIDTH:
            x, top = float(LEFT), top + LINE
        parts.append(f'<polyline points="{x:.1f},{top + 4:.1f} {x + KEY - 6:.1f},{top + 4:.1f}" {_style(index)}/>')
        parts.append(_mark(index, x + (KEY - 6) / 2, top + 4) + _text(x + KEY, top + 8, label, "start"))
        x += width
    return "".join(parts), top - HEIGHT + LINE


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _style(index: int) -> str:
    dash = DASHES[index % len(DASHES)]
    return f'fill="none" stroke="{_colour(index)}" stroke-width="1.5" stroke-dasharray="{dash or "none"}"'


def _mark(index: int, x: float, y: float) -> str:
    """A circle, square, triangle, diamond or cross of the series' colour."""
    kind, colour = index % MARKS, _colour(index)
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>'
    if kind == 4:
        path = f"M{x - 3:.1f} {y - 3:.1f}l6 6M{x - 3:.1f} {y + 3:.1f}l6 -6"
        return f'<path d="{path}" stroke="{colour}" stroke-width="1.8"/>'
    shape = {1: "m-3 -3h6v6h-6z", 2: "m0 -4l4 7h-8z", 3: "m0 -4l4 4l-4 4l-4 -4z"}[kind]
    return f'<path d="M{x:.1f} {y:.1f}{shape}" fill="{colour}"/>'


def _stroke(x: float, y: float, to_x: float, to_y: float, colour: str, width: float) -> str:
    return f'<path d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _grid_line(x: float, y: float, to_x: float, to_y: float) -> str:
    return _stroke(x, y, to_x, to_y, "#d0d4d9", 1)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(text: str, width: float) -> str:
    room = int(width / LETTER)
    return text if len(text) <= room else f"{text[: max(1, room - 1)]}…"
