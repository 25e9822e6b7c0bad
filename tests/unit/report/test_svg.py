import re
from xml.etree import ElementTree

import pytest

from pipeline.report.svg import BOTTOM as FOOT
from pipeline.report.svg import (
    COLOURS,
    HEIGHT,
    LEFT,
    MARKS,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Series,
    dot_chart,
    line_chart,
    round_ticks,
)

X, Y = Axis("step", [(0, "0"), (100, "100")]), Axis("val mIoU, %", [(40, "40"), (80, "80")])


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 900], ["0", "200", "400", "600", "800", "1000"]),
        ([0.0, 1.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([61.2, 77.9], ["60", "65", "70", "75", "80"]),
        ([0.0], ["0"]),
        ([74.0, 74.0], ["74.0", "74.5"]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(values, expected):
    ticks = round_ticks(values)
    if values != [0.0]:
        assert [label for _, label in ticks] == expected
    assert ticks[0][0] <= min(values)
    assert ticks[-1][0] >= max(values)
    assert ticks[-1][0] > ticks[0][0]


def test_a_chart_is_xml_with_a_title_and_a_description():
    svg = parsed(line_chart("c0", "A < B", "the text", [Series("one", [(0, 40), (100, 80)])], X, Y))
    assert svg.attrib["role"] == "img"
    assert svg.attrib["aria-labelledby"] == "c0-title c0-text"
    named = {each.attrib["id"]: each.text for each in svg if "id" in each.attrib}
    assert named == {"c0-title": "A < B", "c0-text": "the text"}
    assert {"step", "val mIoU, %", "one", "100", "80"} <= {each.text for each in svg.iter("text")}


def test_points_are_where_the_axes_say():
    svg = parsed(line_chart("c", "t", "d", [Series("one", [(0, 40), (50, 60), (100, 80)])], X, Y))
    line = next(each for each in svg.iter("polyline"))
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    middle = ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - FOOT) / 2)
    assert points == [(LEFT, HEIGHT - FOOT), middle, (WIDTH - RIGHT, TOP)]


def test_a_logarithmic_axis_spreads_halves_evenly():
    axis = Axis("share", [(1 / 16, "1/16"), (1 / 4, "1/4"), (1.0, "full")], log=True)
    assert [axis.place(0, 100)(value) for value in (1 / 16, 1 / 8, 1 / 4, 1.0)] == [0, 25, 50, 100]


def test_many_series_differ_by_more_than_colour():
    series = [Series(f"s{index}", [(0, 50), (100, 60)]) for index in range(12)]
    svg = line_chart("c", "t", "d", series, X, Y)
    styles = re.findall(r'stroke="(#\w+)" stroke-width="1.5" stroke-dasharray="([^"]+)"', svg)[:12]
    assert len({(colour, dash, index % MARKS) for index, (colour, dash) in enumerate(styles)}) == 12
    assert len({dash for _, dash in styles}) > 1


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_stand_out_from_white(colour):
    """3:1, as WCAG asks of graphics."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert 1.05 / (luminance + 0.05) >= 3


def test_error_bars_and_single_points():
    svg = parsed(line_chart("c", "t", "d", [Series("one", [(50, 60)], [10.0])], X, Y))
    (bar,) = [each for each in svg.iter("path") if each.attrib["stroke"] == COLOURS[0]]
    ends = [float(number) for number in re.findall(r"[\d.]+", bar.attrib["d"])]
    assert ends[1] - ends[3] == pytest.approx((HEIGHT - TOP - FOOT) / 2, abs=0.2)


def test_names_are_text_and_the_long_ones_are_cut():
    evil = "<script>" + 80 * "x"
    for svg in (
        line_chart("c", evil, evil, [Series(evil, [(0, 50)])], X, Y),
        dot_chart("c", evil, evil, [(evil, (50, 60), 1.0)], Axis("mIoU", [(0, "0"), (100, "100")])),
    ):
        assert "<script" not in svg
        (label,) = [text for each in parsed(svg).iter("text") if (text := each.text or "").startswith("<script>")]
        assert label.endswith("…")
