"""Charts over the steps: what they show, what they leave out and say, and that their lines can be told apart."""

from typing import Any

import pytest

from pipeline.report.compare import Comparison
from pipeline.report.curves import constant, of_split
from tests.unit.report.made import only, write_run
from tests.unit.report.test_plots import words

LOGS = {"kept": lambda step: step / 50, "bank_fill": [1.0, 1.0], "lr": lambda step: 1 / step}


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    for seed in (0, 1):
        score = 0.6 + 0.02 * seed
        write_run(tmp_path / f"s{seed}", "suponly", "1_4", seed, (0.3, score), logs={"lr": LOGS["lr"]})
        write_run(tmp_path / f"u{seed}", "u2pl", "1_4", seed, (0.4, score + 0.05), logs=LOGS)
    return only(tmp_path)


def ys(line: Any) -> list[float]:
    return [float(value) for value in line.get_ydata()]


def test_curves_are_means_over_seeds_with_each_seeds_end(comparison):
    curves, *logged = of_split(comparison, "1_4")
    assert (curves.title, curves.caption) == ("Validation mIoU", "Mean over 2 seeds; marks at the end: each seed.")
    assert [chart.name for chart in logged] == ["lr-1_4", "kept-1_4"]
    mean, ends = curves.figure.axes[0].lines[:2]
    assert ys(mean)[-1] == pytest.approx(61)
    assert ys(ends) == pytest.approx([60, 62])
    assert logged[1].figure.axes[0].get_ylim()[0] == 0


def test_one_line_needs_no_legend_and_is_named_below(comparison):
    lr, kept = of_split(comparison, "1_4")[1:]
    assert kept.figure.legends == []
    assert kept.caption == "u2pl, mean over 2 seeds; marks at the end: each seed."
    assert lr.caption.startswith("suponly, u2pl, mean"), "the same numbers are one line"


def test_what_does_not_change_is_said_and_not_drawn(comparison):
    assert constant(comparison, "1_4") == (
        "Not drawn, as it does not change: Memory bank, filled part (mean over classes) (1)."
    )


def test_one_seed_is_called_so(tmp_path):
    write_run(tmp_path / "a", scores=(0.1, 0.2))
    (curves,) = of_split(only(tmp_path), "1_4")
    assert curves.caption == "suponly, one seed."


def test_losses_one_chart_each_and_their_sum(tmp_path):
    logs = {"total": lambda step: 2 / step, "loss": lambda step: {"supervised": 1 / step, "contrastive": 1 / step}}
    write_run(tmp_path / "u", "u2pl", scores=(0.1, 0.1), logs=logs)
    assert [chart.title for chart in of_split(only(tmp_path), "1_4")] == [
        "Loss: total", "Loss: supervised", "Loss: contrastive",
    ]  # fmt: skip
    write_run(tmp_path / "s", "suponly", "1_8", scores=(0.1, 0.1), logs={"loss": lambda step: {"supervised": step}})
    assert [chart.title for chart in of_split(only(tmp_path / "s"), "1_8")] == ["Loss: supervised"]


def test_points_tell_their_values_on_a_page(comparison):
    page = of_split(comparison, "1_4")[0].inline()
    assert "<title>suponly, step 20: 61</title>" in page
    assert "<title>u2pl, step 10: 40</title>" in page


def test_many_series_differ_by_more_than_colour(tmp_path):
    for at in range(12):
        write_run(
            tmp_path / f"{at}", "u2pl", "1_4", scores=(0.4, 0.5 + 0.01 * at), config={"u2pl": {"alpha_0": 0.01 * at}}
        )
    curves, *_ = of_split(only(tmp_path), "1_4")
    lines = curves.figure.axes[0].lines[::3]
    assert len({(str(line.get_color()), str(line.get_linestyle()), str(line.get_marker())) for line in lines}) == 12
    assert len({str(line.get_marker()) for line in lines}) > 3


def test_names_are_text_and_the_long_ones_are_cut(tmp_path):
    evil = "<script>$x$" + 80 * "x"
    write_run(tmp_path / "a", "u2pl", "1_4", scores=(0.4, 0.5))
    write_run(tmp_path / "b", "u2pl", "1_4", scores=(0.4, 0.6), config={"model": {"weights": evil}})
    curves, *_ = of_split(only(tmp_path), "1_4")
    assert b"<script" not in curves.drawn("svg")
    (label,) = [text for text in words(curves.drawn("svg")) if "<script>" in text]
    assert label.endswith("…")
