"""Naive self-training as a user starts it: real Ray, a real S3 server, a killed driver."""

import json
import sys
from pathlib import Path

import pytest

from pipeline import checkpoint, cli, storage
from pipeline.checkpoint import Progress
from pipeline.datasets.format import open_dataset
from pipeline.datasets.pseudo import LABELS_FILE, open_labels
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.training.launch import launch
from pipeline.training.self_training import self_train
from tests.jobs import Job, environment
from tests.processes import descendants, kill, wait_for
from tests.s3 import S3Server

FLAGS = ["--preset", "demo", "--split", "1_4", "--optim.steps", "6", "--run.tensorboard", "false"]


def test_a_killed_recipe_goes_on_where_it_was(shapes: str, s3: S3Server, ray_folder: str, tmp_path: Path) -> None:
    run, env = "s3://runs/self-training", environment(ray_folder, s3)
    command = [sys.executable, "jobs/self_training.py", *FLAGS, "--data", shapes, "--out", run]
    labels = f"{run}/pseudo_labels"
    with Job(command, env, tmp_path / "first.log") as job:
        wait_for("labels of a shard", lambda: storage.list_files(labels), 300)
        kill(job.pid, *descendants(job.pid))
        assert not storage.exists(f"{labels}/{LABELS_FILE}"), job.said
    first = _written(labels)
    with Job(command, env, tmp_path / "second.log") as job:
        assert job.wait() == 0, job.said
        assert f"{run}/teacher is finished" in job.said
        assert "Traceback" not in job.said
    dataset = open_dataset(shapes)
    info = open_labels(labels, dataset)
    assert info.images == 300
    second = _written(labels)
    assert set(second) == {*info.shards, LABELS_FILE}
    assert {name: second[name] for name in first} == first  # what was there was not made again
    progress = Progress.from_dict(json.loads(storage.read_bytes(f"{run}/student/summary.json")))
    assert progress.step == 6
    meta = checkpoint.read_meta(checkpoint.find(f"{run}/student"))
    assert meta["data"]["pseudo_labels"] == info.digest
    assert meta["config"]["method"] == "self_training"


def _written(root: str) -> dict[str, object]:
    """When each file was written."""
    filesystem, path = storage.resolve(root)
    return {name: filesystem.get_file_info(f"{path}/{name}").mtime_ns for name in storage.list_files(root)}


@pytest.mark.usefixtures("ray_cluster")
def test_other_options_do_not_pass_for_the_same_run(shapes: str, tmp_path: Path) -> None:
    flags = [*FLAGS, "--data", shapes, "--out", str(tmp_path)]

    def configured(*more: str):
        return cli.parse_config([*flags, *more], "test", OPTIONS)[0]

    self_train(configured())
    with pytest.raises(UserError, match=r"pseudo_labels holds labels .* --fresh"):
        self_train(configured("--self_training.keep", "0.5"))
    progress = self_train(configured("--self_training.keep", "0.5", "--self_training.strong", "false"), fresh=True)
    assert progress.step == 6
    with pytest.raises(UserError, match=r"needs data\.pseudo_labels; `u2pl self_training`"):
        launch(configured("--method", "self_training"))
    with pytest.raises(UserError, match="method u2pl uses none"):
        launch(configured("--data.pseudo_labels", str(tmp_path / "pseudo_labels")))
