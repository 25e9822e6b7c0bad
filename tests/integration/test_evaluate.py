"""`u2pl evaluate` as a user starts it: real Ray, a dataset on a real S3 server, a page in a real browser."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import storage
from pipeline.cluster import tasks
from pipeline.datasets.images import decode_mask
from pipeline.inference.load import load_model
from pipeline.inference.score_tasks import plan, score
from tests.browser import PROGRAM, Browser
from tests.jobs import Job
from tests.networks import train_briefly


@pytest.fixture(scope="module")
def run(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("run"))
    train_briefly(shapes, out)
    return out


@pytest.fixture
def on_s3(shapes: str, bucket: str) -> str:
    """The dataset in a bucket."""
    for file in storage.list_files(shapes):
        if not file.startswith("shards/train"):
            storage.write_bytes(f"{bucket}/set/{file}", storage.read_bytes(f"{shapes}/{file}"))
    return f"{bucket}/set"


@pytest.mark.usefixtures("ray_cluster")
def test_one_and_two_workers_count_the_same(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, found = tasks.run, []
    for workers, batch in ((1, None), (2, 1), (2, 5)):
        monkeypatch.setattr(tasks, "run", partial(real, workers=workers))
        job = plan(run, batch=batch, flip=True, scales=(1.0, 0.5))
        found.append(score(job)["student"])
    assert sum(found[0].confusion.matrix.flatten().tolist()) == 150 * 64 * 64
    assert len(found[0].images) == 150
    for other in found[1:]:
        assert torch.equal(other.confusion.matrix, found[0].confusion.matrix)
        assert torch.equal(other.boundary, found[0].boundary)
        assert other.images == found[0].images


def test_all_that_is_written(run: str, on_s3: str, bucket: str, tmp_path: Path, joined: dict[str, str]) -> None:
    page, places = tmp_path / "scores.html", ["--json", f"{bucket}/scores.json", "--export_submission", f"{bucket}/sub"]
    command = [sys.executable, "jobs/evaluate.py", run, "--data", on_s3, "--page", str(page), *places]
    with Job(command, joined, tmp_path / "evaluate.log") as job:
        assert job.wait(480) == 0, job.said
    said = job.said.splitlines()
    assert f"150 predictions of the student in {bucket}/sub" in said
    found = json.loads(storage.read_bytes(f"{bucket}/scores.json"))
    student = found["networks"]["student"]
    assert said[-1] == f"val mIoU student {100 * student['miou']:.2f}"
    files = storage.list_files(f"{bucket}/sub")
    assert sorted(files) == sorted(f"{name}.png" for name in student["images"])
    assert len(files) == 150
    predicted = np.zeros(6, int)
    for file in files:
        predicted += np.bincount(decode_mask(storage.read_bytes(f"{bucket}/sub/{file}")).ravel(), minlength=6)
    assert predicted.tolist() == np.sum(student["confusion"], axis=0).tolist()
    assert load_model(run).classes == tuple(found["classes"])

    worst = min(student["images"], key=lambda name: (student["images"][name], name))
    assert f"{worst}: {100 * student['images'][worst]:.2f}" in page.read_text()
    if PROGRAM is None:
        pytest.skip("no chromium: apt-get install chromium; what is written was checked, the page was not opened")
    with Browser() as browser:
        browser.open(page, 400)
        assert worst in browser.evaluate("document.body.innerText")
        assert browser.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
        assert browser.evaluate("document.images.length") == 12
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400
        assert browser.requests() == []
        assert browser.complaints() == []
