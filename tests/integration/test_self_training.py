"""Naive self-training as a user starts it: real Ray, a real S3 server, a killed driver."""

import json
import re
import sys
from pathlib import Path

import pytest

from pipeline import checkpoint, storage
from pipeline.checkpoint import Progress
from pipeline.config import cli
from pipeline.config.schema import Config
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.pseudo import LABELS_FILE, open_labels
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.training.launch import launch
from pipeline.training.lease import LEASE_FILE
from tests.jobs import Job
from tests.processes import descendants, kill, wait_for

FLAGS = ["--preset", "demo", "--split", "1_2", "--optim.steps", "6", "--run.tensorboard", "false"]


@pytest.mark.night
def test_a_killed_recipe_goes_on_where_it_was_and_keeps_its_options(
    shapes: str, joined: dict[str, str], tmp_path: Path
) -> None:
    """Other options do not pass for the same run, and an old student not for the result of a new teacher."""
    run = "s3://runs/self-training"
    command = [sys.executable, "jobs/self_training.py", *FLAGS, "--data", shapes, "--out", run]
    labels = f"{run}/pseudo_labels"
    with Job(command, joined, tmp_path / "first.log") as job:
        assert job.wait() == 0, job.said
    _check(run, shapes, {})
    before = _written(labels)
    other = [*command, "--self_training.keep", "0.5"]
    with Job(other, joined, tmp_path / "other.log") as job:
        assert job.wait() == 2, job.said
    assert re.search(r"pseudo_labels holds labels .* --fresh", job.said.splitlines()[-1])
    _check(run, shapes, before)

    def relabeled() -> bool:
        now = _written(labels)
        return bool(now) and not now.items() & before.items()

    other += ["--self_training.strong", "false"]
    with Job([*other, "--fresh"], joined, tmp_path / "fresh.log") as job:
        wait_for("new labels of a shard", lambda: relabeled() or job.ended, 300)
        kill(job.pid, *descendants(job.pid))
        assert "is finished" not in job.said
        assert not storage.exists(f"{labels}/{LABELS_FILE}"), job.said
        assert storage.list_files(f"{run}/student") == [LEASE_FILE]  # given up by the student before
    first = _written(labels)
    with Job(other, joined, tmp_path / "last.log") as job:
        assert job.wait() == 0, job.said
        assert f"{run}/teacher is finished" in job.said
        assert f"{run}/student is finished" not in job.said
        assert "Traceback" not in job.said
    _check(run, shapes, first)


def _check(run: str, shapes: str, first: dict[str, object]) -> None:
    """All labels are there, those of `first` as they were, and the student is of them."""
    labels = f"{run}/pseudo_labels"
    dataset = open_dataset(shapes)
    info = open_labels(labels, dataset)
    assert info.images == 200
    second = _written(labels)
    assert set(second) == {*info.shards, LABELS_FILE}
    assert {name: second[name] for name in first} == first  # what was there was not made again
    progress = Progress.from_dict(json.loads(storage.read_bytes(f"{run}/student/summary.json")))
    assert progress.step == 6
    meta = checkpoint.read_meta(checkpoint.find(f"{run}/student"))
    assert meta.data["pseudo_labels"] == info.digest
    assert meta.config["method"] == "self_training"


def _written(root: str) -> dict[str, object]:
    """When each file was written."""
    filesystem, path = storage.resolve(root)
    return {name: filesystem.get_file_info(f"{path}/{name}").mtime_ns for name in storage.list_files(root)}


def test_labels_are_given_to_the_method_that_uses_them(shapes: str, tmp_path: Path) -> None:
    flags = [*FLAGS, "--data", shapes, "--out", str(tmp_path)]

    def configured(*more: str) -> Config:
        return cli.parse_config([*flags, *more], "test", OPTIONS)[0]

    with pytest.raises(UserError, match=r"needs data\.pseudo_labels; `u2pl self_training`"):
        launch(configured("--method", "self_training"))
    with pytest.raises(UserError, match="method u2pl uses none"):
        launch(configured("--data.pseudo_labels", str(tmp_path / "pseudo_labels")))
