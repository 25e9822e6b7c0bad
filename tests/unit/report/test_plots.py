"""Charts: what they show, that they can be told apart, and that their files are whole and the same each time."""

import io
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from pipeline.report.compare import Comparison
from pipeline.report.plots import COLOURS, FORMATS, overview
from tests.unit.report.made import only, write_run

SPLITS = ("1_16", "1_4", "full")


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    for at, split in enumerate(SPLITS):
        for seed in (0, 1):
            score = 0.5 + 0.1 * at + 0.02 * seed
            write_run(tmp_path / f"s{split}{seed}", "suponly", split, seed, (0.3, score))
            write_run(tmp_path / f"u{split}{seed}", "u2pl", split, seed, (0.4, score + 0.05))
    return only(tmp_path)


def words(svg: bytes) -> list[str]:
    return [text for each in ElementTree.fromstring(svg).iter() if (text := (each.text or "").strip())]


def test_the_overview_has_a_line_for_each_method_over_the_labeled_share(comparison):
    chart = overview(comparison)
    assert chart is not None
    (axes,) = chart.figure.axes
    lines = {container.get_label(): container[0] for container in axes.containers}
    assert lines["u2pl"].get_xdata() == pytest.approx([1 / 16, 1 / 4, 1])
    assert lines["u2pl"].get_ydata() == pytest.approx([56, 66, 76])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1/16", "1/4", "full"]
    assert axes.get_xscale() == "log"
    assert chart.text == "At the right end: suponly 71; u2pl 76."
    assert {"val mIoU, %", "labeled share of the images", "1/16", "suponly", "u2pl"} <= {*words(chart.drawn("svg"))}


def test_one_split_has_a_dot_and_a_ring_for_each_row(tmp_path):
    write_run(tmp_path / "a", "suponly", "1_8", scores=(0.7, 0.6))
    chart = overview(only(tmp_path))
    assert chart is not None
    assert (chart.title, chart.text) == ("mIoU on split 1_8", "suponly 60.00")
    (axes,) = chart.figure.axes
    drawn: list[Any] = [line for line in axes.lines if line.get_visible()]
    assert sorted(float(line.get_xdata()[0]) for line in drawn) == pytest.approx([60, 70])


def test_no_finished_run_has_no_overview(tmp_path):
    write_run(tmp_path / "a", scores=(), finished=False, data={})
    assert overview(only(tmp_path)) is None


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_stand_out_from_white(colour):
    """3:1, as WCAG asks of graphics."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert 1.05 / (luminance + 0.05) >= 3


def test_files_are_whole_and_the_same_each_time(comparison):
    chart = overview(comparison)
    assert chart is not None
    for _ in range(2):
        chart.inline()  # leaves the files as they are: no marks that only a page can tell of
        drawn = {kind: chart.drawn(kind) for kind in FORMATS}
        assert drawn == {kind: chart.drawn(kind) for kind in FORMATS}
        assert drawn["pdf"].startswith(b"%PDF")
        assert ElementTree.fromstring(drawn["svg"]).tag.endswith("svg")
        with Image.open(io.BytesIO(drawn["png"])) as picture:
            assert picture.width > 600
        assert b"values-" not in drawn["svg"]
