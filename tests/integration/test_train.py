"""The whole system with real parts: Ray workers, an S3 server, kills, and jobs as a user starts them."""

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pipeline import checkpoint, commands, storage
from pipeline.checkpoint import Progress
from pipeline.config import cli
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.inference.load import score
from pipeline.methods import OPTIONS
from pipeline.training.launch import launch
from pipeline.training.recovery import RECORD_FILE
from pipeline.training.runtime import PlainRuntime
from pipeline.training.trainer import train
from tests.jobs import SHORT, Job, has_checkpoint, records, train_command
from tests.processes import descendants, kill, named, wait_for
from tests.s3 import S3Server

ROOT = Path(__file__).parents[2]
CALM = ["--optim.optimizer", "sgd", "--optim.lr", "0.005"]
"""AdamW's first steps turn rounding errors into whole steps: two orders of one batch then differ by 3e-3."""

LONG = ["--optim.steps", "40", "--u2pl.warmup", "5", "--scaling.workers", "2", "--run.checkpoint_every", "10"]
"""A run in which there is time to lose something."""


def configured(*flags: str) -> Config:
    config, _ = cli.parse_config([*SHORT, *flags], "test", OPTIONS)
    return config


def assert_same_state(one: str, other: str) -> None:
    """Every tensor of two checkpoints is equal, bit for bit."""
    first, second = (checkpoint.read_state(uri)["method"] for uri in (one, other))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


class Calm(NamedTuple):
    """A run that nothing happened to."""

    run: str
    progress: Progress


@pytest.fixture(scope="module")
def calm(shapes: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """With the flags `LONG`."""
    run = str(tmp_path_factory.mktemp("calm") / "run")
    return Calm(run, launch(configured(*LONG, "--data", shapes, "--out", run)))


@pytest.mark.usefixtures("ray_cluster")
class TestWorkers:
    def test_two_workers_equal_one_process(self, shapes: str, tmp_path: Path) -> None:
        """U2PL, whose warm-up is SupOnly; tests/parity/test_worlds.py compares the loop of each method, without Ray."""
        flags = ("--data", shapes, "--optim.steps", "10", *CALM, "--u2pl.warmup", "3", "--u2pl.lambda_c", "0")
        plain, ray_run = str(tmp_path / "plain"), str(tmp_path / "ray")
        train(configured(*flags, "--out", plain), PlainRuntime(plain))
        launch(configured(*flags, "--out", ray_run, "--scaling.workers", "2"))
        losses = [[record["total"] for record in records(run)] for run in (plain, ray_run)]
        assert len(losses[0]) == len(losses[1]) == 10
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def test_a_killed_worker_costs_nothing_but_time(
        self, shapes: str, calm: Calm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hurt = str(tmp_path / "hurt")

        def assassin() -> None:
            wait_for("a registered checkpoint", lambda: has_checkpoint(hurt))
            kill(named(os.getpid(), "RayTrainWorker")[0])

        thread = threading.Thread(target=assassin)
        thread.start()
        progress = launch(configured(*LONG, "--data", shapes, "--out", hurt))
        thread.join()
        said = capsys.readouterr().out
        assert "was lost" in said
        assert "resuming from" in said
        assert progress.step == 40
        assert_same_state(*(storage.join(run, checkpoint.name(40)) for run in (calm.run, hurt)))
        steps = [record["step"] for record in records(hurt)]
        assert steps == list(range(1, 41))  # no record lost, none twice

    def test_evaluate_and_report_repeat_the_figure_of_the_loop(
        self, calm: Calm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run, progress = calm
        assert progress.last is not None
        _, scores = score(run, None, torch.device("cpu"))
        assert {name: each.miou for name, each in scores.items()} == progress.last.miou
        assert list(scores["teacher"].iou) == progress.last.iou

        page = tmp_path / "report.html"
        commands.report([run, "--out", str(page), "--images", "2"])
        assert f"{100 * progress.last.value:.2f}" in capsys.readouterr().out
        text = page.read_text()
        assert "What the networks see" in text
        assert "No pictures" not in text
        assert "CPU-hours of training and evaluation" in text

    def test_a_finished_run_is_not_trained_again(
        self, shapes: str, calm: Calm, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = records(calm.run)
        assert launch(configured(*LONG, "--data", shapes, "--out", calm.run)) == calm.progress
        assert "is finished" in capsys.readouterr().out
        assert records(calm.run) == before

    def test_mistakes_that_only_workers_see(self, shapes: str, tmp_path: Path) -> None:
        weights = tmp_path / "weights.pth"
        torch.save({"features.0.0.weight": torch.zeros(1)}, weights)
        flags = ["--optim.steps", "4", "--method", "suponly", "--run.max_failures", "0"]
        wrong = ["--model.backbone", "mobilenet_v2", "--model.weights", str(weights), "--out", str(tmp_path / "a")]
        with pytest.raises(UserError, match=r"weights\.pth.*mobilenet_v2"):
            launch(configured(*flags, "--data", shapes, *wrong))

        damaged = tmp_path / "damaged"
        shutil.copytree(shapes, damaged)
        for shard in (damaged / "shards").glob("train-*"):
            data = bytearray(shard.read_bytes())
            data[1000 : len(data) // 2 : 500] = bytes(len(range(1000, len(data) // 2, 500)))
            shard.write_bytes(data)
        with pytest.raises(UserError, match=r"train-\d+\.parquet.*damaged"):
            launch(configured(*flags, "--data", str(damaged), "--out", str(tmp_path / "b")))


def test_a_killed_driver_goes_on_from_s3(shapes: str, s3: S3Server, joined: dict[str, str], tmp_path: Path) -> None:
    run = "s3://runs/killed"
    command = train_command(*LONG, "--scaling.workers", "1", "--data", shapes, "--out", run)
    with Job(command, joined, tmp_path / "first.log") as job:
        wait_for("a registered checkpoint", lambda: has_checkpoint(run))
        kill(job.pid, *descendants(job.pid))
    storage.write_bytes(f"{run}/{RECORD_FILE}", b'{"ray_version": "2.')  # as if the kill had met Ray writing it
    with Job(command, joined, tmp_path / "second.log") as job:
        assert job.wait() == 0, job.said
        assert "resuming from s3://runs/killed/step_" in job.said
        assert "Traceback" not in job.said
    progress = Progress.from_dict(json.loads(storage.read_bytes(f"{run}/summary.json")))
    assert progress.step == 40
    assert progress.last is not None
    assert [record["step"] for record in records(run)] == list(range(1, 41))
    assert s3.environment()["AWS_SECRET_ACCESS_KEY"] not in "".join(
        storage.read_bytes(storage.join(run, file)).decode(errors="replace")
        for file in storage.list_files(run)
        if file.endswith((".json", ".yaml", ".jsonl"))
    )
    with Job([sys.executable, "jobs/evaluate.py", run, "--data", shapes], joined, tmp_path / "evaluate.log") as job:
        assert job.wait() == 0, job.said
        assert f"val mIoU teacher {100 * progress.last.value:.2f}" in job.said
