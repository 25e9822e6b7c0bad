"""The whole system with real parts: Ray workers, an S3 server, kills, and jobs as a user starts them."""

import json
import os
import re
import shlex
import shutil
import signal
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
from pipeline.inference.score_tasks import plan, score
from pipeline.methods import OPTIONS
from pipeline.training.launch import launch
from pipeline.training.lease import LEASE_FILE
from pipeline.training.recovery import RECORD_FILE
from pipeline.training.runtime import PlainRuntime
from pipeline.training.trainer import train
from tests.heads import Head
from tests.jobs import SHORT, Job, environment, has_checkpoint, records, train_command
from tests.processes import descendants, held, kill, named, wait_for
from tests.s3 import S3Server

ROOT = Path(__file__).parents[2]
CALM = ["--optim.optimizer", "sgd", "--optim.lr", "0.005"]
"""AdamW's first steps turn rounding errors into whole steps: two orders of one batch then differ by 3e-3."""

LONG = ["--optim.steps", "40", "--u2pl.warmup", "5", "--scaling.workers", "2", "--run.checkpoint_every", "10"]
"""A run in which there is time to lose something."""

NAME = "größere Läufe, 日本 #1 100% "
NAME += "n" * (255 - len(NAME.encode()))
"""The longest name that a disk and this S3 server can have, and not a plain one."""


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
        hurt = str(tmp_path / NAME)

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
        job = plan(run)
        scores = {name: job.measures(tally) for name, tally in score(job).items()}
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

    def test_a_dry_run_says_what_would_run_and_touches_nothing(
        self, shapes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        new = tmp_path / "new"
        flags = [*SHORT, "--data", shapes, "--out", str(new), "--dry_run", "--workers"]
        commands.train([*flags, "2"])
        said = capsys.readouterr().out.splitlines()
        assert said[1].startswith("2 workers, global batch 4 labeled + 8 unlabeled")
        assert said[-1] == "it would start from step 0; nothing was started"
        with pytest.raises(UserError, match=r"scaling\.workers 3 does not share the batch"):
            commands.train([*flags, "3"])
        assert not new.exists()
        new.mkdir()
        (new / "summary.json").touch()
        commands.train([*flags, "2"])
        assert capsys.readouterr().out.splitlines()[-1] == "it is finished"

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


def test_the_first_signal_asks_and_the_second_ends(
    shapes: str, s3: S3Server, head: Head, joined: dict[str, str], ray_folder: str, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    command = train_command("--optim.steps", "200", "--run.checkpoint_every", "150", "--scaling.workers", "1")
    command += ["--data", shapes, "--out", run]
    with Job(command, joined, tmp_path / "early.log") as early:
        wait_for("the header", lambda: "results in" in early.said or early.ended)
        os.kill(early.pid, signal.SIGTERM)
        assert early.wait() == 128 + signal.SIGTERM, early.said
        assert re.match("train.py: (ended|stopped) by SIGTERM", early.said.splitlines()[-1]), early.said
    with Job(command, joined, tmp_path / "twice.log") as twice:
        wait_for("some steps", lambda: "step      5/200" in twice.said or twice.ended)
        (worker,) = head.workers
        with held(worker):  # which so cannot come to its next step
            os.kill(twice.pid, signal.SIGTERM)
            wait_for("what it says", lambda: "then the end; once more ends at once" in twice.said or twice.ended)
            os.kill(twice.pid, signal.SIGTERM)
            assert twice.wait() == 128 + signal.SIGTERM, twice.said
        last = twice.said.splitlines()[-1]
        assert last == "train.py: stopped by SIGTERM; the same command goes on from the newest checkpoint"
    assert checkpoint.written(run) == []
    # a Ray of its own, whose processes hear a terminal's Ctrl-C, too
    with Job(command, environment(ray_folder, s3), tmp_path / "late.log", group=True) as late:
        wait_for("some steps", lambda: "step      5/200" in late.said or late.ended)
        os.killpg(late.pid, signal.SIGINT)
        assert late.wait() == 128 + signal.SIGINT, late.said
    last = late.said.splitlines()[-1]
    assert (
        last
        == f"train.py: stopped by SIGINT after step {records(run)[-1]['step']}; the same command goes on from there"
    )
    assert "Traceback" not in early.said + twice.said + late.said
    assert checkpoint.written(run) == [checkpoint.name(records(run)[-1]["step"])]


def test_one_writer_and_a_killed_driver_on_s3(
    shapes: str, s3: S3Server, joined: dict[str, str], tmp_path: Path
) -> None:
    run = f"s3://runs/a prefix, größer/{NAME}"
    command = train_command(*LONG, "--scaling.workers", "1", "--data", shapes, "--out", run)
    with Job(command, joined, tmp_path / "first.log") as job:
        wait_for("the first job's lease", lambda: storage.exists(f"{run}/{LEASE_FILE}"))
        with Job(command, joined, tmp_path / "late.log") as late:
            assert late.wait() == 2, late.said
            assert f"{run} is being written by train.py (process {job.pid} on " in late.said
            assert len(late.said.splitlines()) == 1
        wait_for("a registered checkpoint", lambda: has_checkpoint(run))
        kill(job.pid, *descendants(job.pid))
    storage.write_bytes(f"{run}/{RECORD_FILE}", b'{"ray_version": "2.')  # as if the kill had met Ray writing it
    with Job(command, joined, tmp_path / "second.log") as job:
        assert job.wait() == 0, job.said
        said = job.said.splitlines()
        resumed = next(at for at, line in enumerate(said) if line.startswith(f"resuming from {run}/step_"))
        assert "starting 1 worker" in said[:resumed]
        assert "reading" in said[resumed:]
        assert said[-3] == f"next: u2pl evaluate {shlex.quote(run)}"
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
