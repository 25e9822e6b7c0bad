"""Scores as text, as JSON and as a page: the same numbers, and names that are never markup."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.datasets.prepared.dataset import INDEX_SCHEMA, Dataset, DatasetInfo
from pipeline.inference.evaluate import ScoredGroup
from pipeline.inference.measures import Bad, Tally
from pipeline.inference.score_tasks import Job, Recipe, Way
from pipeline.report.scores_page import as_json, as_page, as_text
from tests.unit.report.test_dataset_page import EVIL, Tags

CLASSES = ("sky", "road", "a & b", "void")


def job_of(mode: str = "whole", *, usual: bool = True, classes: tuple[str, ...] = CLASSES) -> Job:
    info = DatasetInfo(
        name="toy", classes=classes, palette=((1, 2, 3),) * 4, counts={"train": 0, "val": 3}, evaluation="whole",
        protocol="", index_hash="", shards={},
    )  # fmt: skip
    dataset = Dataset("/data/toy", info, INDEX_SCHEMA.empty_table())
    way = Way(mode, (769, 513), (0.5, 1.0) if not usual else (1.0,), flip=not usual)
    recipe = Recipe("runs/x/step_9", dataset.root, way, None, True, None)
    return Job(recipe, dataset, "val", [ScoredGroup("s", 0, (0, 1)), ScoredGroup("s", 1, (0,))], usual)


@pytest.fixture
def tallies() -> dict[str, Tally]:
    """A teacher that is right on 3 of 4 pixels, and a student that is always right; `void` is absent."""
    target = torch.tensor([[[0, 0, 1, 2], [0, 0, 1, 255]]], dtype=torch.uint8)
    found = {}
    for name, wrong in (("teacher", 1), ("student", 0)):
        seen = target.long().clamp_max(3)
        seen[0, 0, :wrong] = 1
        found[name] = Tally(4)
        sure = 0.1 + 0.6 * torch.nn.functional.one_hot(seen, 4).permute(0, 3, 1, 2).float()
        found[name].update(["one"], sure, sure.argmax(1), target)
        found[name].keep([Bad(0.25, EVIL, np.full((5, 23, 3), 7, np.uint8))] if wrong else [])
    return found


def test_text_ends_with_the_score(tallies):
    lines = as_text(job_of(), tallies).splitlines()
    assert lines[0] == "teacher: val of toy, 3 images, whole"
    assert lines[1].split() == ["class", "IoU", "accuracy", "Dice", "boundary", "IoU"]
    assert lines[3].split() == ["sky", "75.00", "75.00", "85.71", "75.00"]
    assert lines[4].split() == ["road", "66.67", "100.00", "80.00", "66.67"]
    assert lines[6].split() == ["void", "-", "-", "-", "-"]
    assert lines[7].split()[:2] == ["mean", "80.56"]
    assert lines[8] == "pixel accuracy 85.71, frequency-weighted IoU 76.19, calibration error 15.71"
    assert lines[9] == "val mIoU teacher 80.56 over 3 of 4 classes"
    assert lines[-1] == "val mIoU student 100.00 over 3 of 4 classes"


def test_another_way_of_scoring_is_named_wherever_a_score_stands(tallies):
    way = "sliding 769x513, scales 0.5 1, flip"
    lines = as_text(job_of("sliding", usual=False), tallies).splitlines()
    assert lines[0] == f"teacher: val of toy, 3 images, {way}"
    assert lines[-1] == f"val mIoU student 100.00 over 3 of 4 classes ({way})"
    release = job_of("voc_crop513", usual=False)
    assert as_text(release, tallies).splitlines()[-1].startswith("val mIoU student 75.00 (voc_crop513")
    assert "an IoU of 0, as in the U2PL release" in as_page(release, tallies)
    tables = [each["aria-label"] for each in Tags(as_page(release, tallies)).of("div") if "aria-label" in each]
    assert len(tables) == 4
    assert all("voc_crop513, scales 0.5 1, flip" in str(each) for each in tables)


def test_json_has_the_numbers(tallies):
    found = json.loads(as_json(job_of(), tallies))
    assert (found["way"], found["images"], found["classes"]) == ("whole", 3, list(CLASSES))
    teacher = found["networks"]["teacher"]
    assert list(found["networks"]) == ["teacher", "student"]
    assert teacher["iou"] == [0.75, pytest.approx(2 / 3), 1.0, None]
    assert teacher["confusion"] == [[3, 1, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert teacher["images"] == {"one": pytest.approx((0.75 + 2 / 3 + 1) / 3)}
    assert sum(each["pixels"] for each in teacher["reliability"]) == 7
    assert teacher["calibration_error"] == pytest.approx(6 / 7 - 0.7, abs=1e-6)


def test_the_legend_of_the_worst_images_says_what_grey_is(tallies):
    job = job_of()
    assert "ignored" not in Tags(as_page(job, tallies)).text.split()
    info = replace(job.dataset.info, pixels={"val": (3, 1, 1, 0, 2), "train": (1, 1, 1, 1, 0)})
    job = replace(job, dataset=replace(job.dataset, info=info))
    assert Tags(as_page(job, tallies)).text.split().count("ignored") == 1
    assert "ignored" not in Tags(as_page(replace(job, subset="train"), tallies)).text.split()


def test_page_holds_everything_and_asks_for_nothing(tallies):
    page = as_page(job_of(classes=("sky", "road", EVIL, "void")), tallies)
    tags = Tags(page)
    assert tags.open == []
    assert {tag for tag, _ in tags.found} & {"script", "link", "iframe"} == set()
    assert EVIL not in page
    assert EVIL in tags.text
    assert f"{EVIL}: 25.00" in " ".join(tags.text.split())
    (worst,) = (each for each in tags.of("img") if str(each["src"]).startswith("data:image/jpeg"))
    data = base64.b64decode(str(worst["src"]).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (23, 5)
    assert len(tags.of("svg")) == 2
    assert "confidence 0.700: accuracy 0.857" in str(tags.of("svg")[0]["aria-label"])
