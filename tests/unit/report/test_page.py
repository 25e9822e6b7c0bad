"""The report as a page, as Markdown and as CSV: the same numbers, and names that are never markup."""

import csv
import io
import re
import subprocess
import sys

import numpy as np
import pytest

from pipeline.datasets.specs import KNOWN
from pipeline.report.compare import Comparison
from pipeline.report.page import ImagePanel, as_markdown, as_page
from pipeline.report.published import PROTOCOLS
from pipeline.report.results import COLUMNS, as_csv, classes, cost, tables
from tests.unit.report.made import only, write_run
from tests.unit.report.test_dataset_page import EVIL, Tags

LOGS = {"kept": 0.8, "alpha": lambda step: 1 / step, "bank_fill": lambda step: [0.5, step / 100]}


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    for seed, score in enumerate((0.5, 0.6)):
        for split, more in (("1_8", 0.0), ("1_4", 0.1)):
            write_run(tmp_path / f"s{split}{seed}", "suponly", split, seed, (0.4, score + more))
            write_run(tmp_path / f"u{split}{seed}", "u2pl", split, seed, (0.4, score + more + 0.05), logs=LOGS)
    return only(tmp_path)


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_up_to_two_splits_share_a_table(comparison):
    (table,) = tables(comparison)
    assert table.title == "mIoU in %, mean ± deviation of 2 seeds; gain over suponly in points, ± its 95 % interval"
    assert table.columns == ("method", "1_8 last", "1_8 gain", "1_8 best", "1_4 last", "1_4 gain", "1_4 best")
    assert table.rows == [
        ["suponly", "55.00 ± 7.07", "-", "55.00 ± 7.07", "65.00 ± 7.07", "-", "65.00 ± 7.07"],
        ["u2pl", "60.00 ± 7.07", "+5.00 ± 0.00", "60.00 ± 7.07", "70.00 ± 7.07", "+5.00 ± 0.00", "70.00 ± 7.07"],
    ]
    assert table.strong == {(1, 1), (1, 3), (1, 4), (1, 6)}


def test_more_splits_and_uneven_seeds(tmp_path):
    for split in ("1_16", "1_8", "1_4"):
        for seed in (0, 1):
            write_run(tmp_path / f"{split}-{seed}", split=split, seed=seed, finished=(split, seed) != ("1_4", 1))
    last, best, missing = tables(only(tmp_path))
    assert last.title == "Last mIoU in %, mean ± deviation of 2 seeds unless n says other"
    assert last.strong == set()  # of one row nothing is the best
    assert last.rows == [["suponly", "50.00 ± 0.00", "50.00 ± 0.00", "50.00 n=1"]]
    assert best.columns == ("method", "1_16", "1_8", "1_4")
    assert missing.rows == [["suponly", "1_4", "seed 1: step 10 of 100, last mIoU 50.00 at step 10", "-"]]


def test_gains_have_a_table_of_their_own_beside_many_splits(tmp_path):
    for split in ("1_16", "1_8", "1_4"):
        write_run(tmp_path / f"s{split}", "suponly", split)
        write_run(tmp_path / f"u{split}", "u2pl", split, scores=(0.52,))
    last, gain, _ = tables(only(tmp_path))
    assert last.title == "Last mIoU in %, one seed"
    assert gain.title == "Gain over suponly in points, ± its 95 % interval"
    assert gain.rows == [["suponly", "-", "-", "-"], ["u2pl", "+2.00", "+2.00", "+2.00"]]


def test_classes_are_means_over_seeds(comparison):
    table = classes(comparison, "1_8")
    assert table.columns == ("class", "suponly", "u2pl")
    assert table.rows == [["sky", "65.00", "70.00"], ["road", "45.00", "50.00"]]
    assert table.shades[0][1] == 1.0
    assert table.shades[1][0] == 0.0


def test_csv_round_trip(comparison):
    found = rows(as_csv([comparison]))
    assert [(line["split"], line["method"]) for line in found] == [
        ("1_8", "suponly"), ("1_4", "suponly"), ("1_8", "u2pl"), ("1_4", "u2pl"),
    ]  # fmt: skip
    assert tuple(found[0]) == COLUMNS
    assert found[0]["gain"] == ""
    u2pl = found[2]
    assert (u2pl["dataset"], u2pl["protocol"], u2pl["seeds"], u2pl["list_hash"]) == ("toy", "random", "2", "list-1_8")
    numbers = [float(u2pl[name]) for name in ("last", "last_sd", "best", "best_sd", "gain")]
    assert numbers == pytest.approx([60.0, 7.0711, 60.0, 7.0711, 5.0])


def test_page_holds_everything_and_asks_for_nothing(comparison):
    page = as_page([comparison], {0: ImagePanel(np.zeros((4, 6, 3), np.uint8), "Networks: A (seed 3).")})
    tags = Tags(page)
    assert tags.open == []
    assert {tag for tag, _ in tags.found} & {"script", "link", "iframe"} == set()
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)), "the charts share one page"
    assert "http:" not in page
    assert "https:" not in page
    charts = [each["aria-label"] for each in tags.of("svg")]
    assert len(charts) == 1 + 2 * (1 + 2)  # the overview; for each split the curves, and what U2PL logs
    assert "mIoU over the labeled share. At the right end: suponly 65; u2pl 70." in charts
    assert page.count("Not drawn, as it does not change: Unlabeled pixels that keep a pseudo-label (0.8).") == 2
    assert "<title>u2pl, step 20: 60</title>" in page
    assert all(each.get("alt") for each in tags.of("img"))
    assert {each["scope"] for each in tags.of("th")} == {"col", "row"}
    assert len([each for each in tags.of("details") if "open" in each]) == 1
    assert tags.text.index("u2pl 60.00 against 55.00 of suponly") < tags.text.index("mIoU in %")
    assert "<b>60.00 ± 7.07</b>" in page
    assert "16.00 CPU-hours of training and evaluation, without repeated steps" in tags.text
    assert "8 of 8 runs" in tags.text
    assert "Networks: A (seed 3)." in tags.text
    assert any("Networks: A (seed 3)." in str(each["alt"]) for each in tags.of("img"))
    assert "dataset abcabcabcabc" in tags.text
    assert "Abacus (2 CPUs)" in tags.text
    assert "lambda_c: 0.1" in tags.text
    assert "u2pl train --method u2pl --split 1_8 --seed 1 --data /no/toy --steps 100\n" in tags.text


def test_without_pictures_the_page_says_why_or_nothing(comparison):
    assert "No pictures: the disk is gone" in as_page([comparison], {0: "the disk is gone"})
    assert "What the networks see" not in as_page([comparison], {})


def test_a_page_of_unfinished_runs_alone(tmp_path):
    write_run(tmp_path / "a", scores=(), finished=False, data={})
    page = Tags(as_page([only(tmp_path)], {}))
    assert page.open == []
    assert "seed 0: step 0 of 100, not evaluated yet" in page.text
    assert "cost not recorded" in page.text
    assert as_markdown([only(tmp_path)]).startswith("# 1 runs on toy")


def test_names_are_text_and_never_markup(tmp_path):
    config = {"model": {"weights": EVIL}, "data": {"unlabeled_pools": [EVIL]}}
    write_run(
        tmp_path / "b<i>", seed=1, config=config, about={"dataset": EVIL, "protocol": EVIL, "processor": EVIL},
        data={"index": EVIL, "split": EVIL, "classes": [EVIL, "b"]},
    )  # fmt: skip
    odd = only(tmp_path)
    tags = Tags(as_page([odd], {0: EVIL}))
    assert tags.open == []
    assert tags.of("img") == []
    assert tags.of("i") == []
    assert EVIL in tags.text
    text = as_markdown([odd])
    prose = [line for line in text.splitlines() if not line.startswith("    ")]  # in code, all is text
    assert EVIL not in "\n".join(prose).replace("\\<", "")
    assert "\\<img" in text
    assert rows(as_csv([odd]))[0]["dataset"] == EVIL


def test_markdown_has_the_tables_of_the_page(comparison):
    text = as_markdown([comparison])
    assert "| u2pl | **60.00 ± 7.07** | +5.00 ± 0.00 | **60.00 ± 7.07** | **70.00 ± 7.07** | +5.00" in text
    assert "| sky | 65.00 | 70.00 |" in text
    assert "16.00 CPU-hours" in text
    assert "\n    u2pl train --method suponly --split 1_4 --seed 0 --data /no/toy --steps 100\n" in text


def test_the_cost_says_whose_teachers_are_not_in_it(tmp_path):
    labels = {"data": {"root": "/no/toy", "pseudo_labels": "/gone/pseudo_labels"}}
    write_run(tmp_path / "a/student", "self_training", config=labels)
    assert "steps and the teachers of 1 students, which are not beside them, 1 of 1 runs" in cost(only(tmp_path))
    write_run(tmp_path / "a/teacher", scores=(0.4,))
    assert cost(only(tmp_path)).endswith(
        "2.00 CPU-hours of training and evaluation, without repeated steps, 1 of 1 runs."
    )


def test_failed_trials_are_told(comparison):
    failed = {"u2pl-1_8-s3": "a loss is not finite | <b>"}
    tags = Tags(as_page([comparison], {}, failed))
    assert "Failed trials" in tags.text
    assert "a loss is not finite | <b>" in tags.text
    assert "| u2pl-1\\_8-s3 |".replace("\\", "") in as_markdown([comparison], failed)
    assert "Failed trials" in as_page([], {}, failed)  # where none has begun
    assert "Failed trials" not in as_page([comparison], {})


class TestPublished:
    """The paper's figures stand beside ours where protocol and classes are the paper's."""

    def write(self, folder, classes):
        data = {"index": "i", "split": "s", "classes": classes}
        write_run(folder / "u", "u2pl", "1_8", scores=(0.7,), data=data, about={"protocol": "classic"})
        return only(folder)

    def test_beside_ours(self, tmp_path):
        found = self.write(tmp_path, KNOWN["voc"].classes)
        table = next(table for table in tables(found) if table.title.startswith("Published"))
        assert [row[:2] for row in table.rows[:5]] == [
            ["suponly", "54.92"], ["mean_teacher", "58.93"], ["cutmix_seg", "63.47"], ["pseudoseg", "65.50"],
            ["pc2seg", "66.28"],
        ]  # fmt: skip
        assert table.rows[5:8] == [
            ["u2pl", "69.15", "README of the U2PL release, VOC classic"], ["u2pl, ours", "70.00", "last"],
            ["u2pl, ours", "70.00", "best"],
        ]  # fmt: skip
        page = as_page([found], {})
        assert "513 centre crop" in page
        assert "model.backbone resnet50 instead of resnet101 (u2pl); optim.steps 100 (u2pl)." in page
        lines = [line for line in rows(as_csv([found])) if line["source"] != "runs"]
        assert {line["split"]: line["best"] for line in lines if line["method"] == "u2pl"}["1_16"] == "67.98"

    def test_an_ablation_does_not_stand_beside_the_method_though_all_runs_are_of_it(self, tmp_path):
        data = {"index": "i", "split": "s", "classes": KNOWN["voc"].classes}
        binary = {"u2pl": {"loss": "binary"}}
        write_run(tmp_path / "b", "u2pl", "1_8", data=data, about={"protocol": "blender"}, config=binary)
        found = only(tmp_path)
        (table,) = [table for table in tables(found) if table.title.startswith("Published")]
        labels = [line[0] for line in table.rows]
        assert labels[labels.index("u2pl, ours") - 1] == "u2pl (loss=binary)"
        assert labels.count("u2pl, ours") == 2  # last and best

    def test_not_for_other_classes(self, tmp_path):
        assert not any(table.title.startswith("Published") for table in tables(self.write(tmp_path, ("a", "b"))))

    def test_each_row_names_its_source(self):
        for protocol in PROTOCOLS.values():
            assert protocol.recipe
            assert all(row.source and row.scores for row in protocol.rows)


def test_nothing_that_trains_is_imported():
    """So that a report can be made where no training could run."""
    script = "import sys, pipeline.report.page; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    parts = {name.split(".")[1] for name in modules if name.startswith("pipeline.")}
    assert "report" in parts
    assert not parts & {"training", "methods", "models", "ops", "ingest", "inference"}
    assert "matplotlib.pyplot" not in modules, "it looks for a screen"
