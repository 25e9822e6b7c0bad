"""A search as a user starts it: samples of real runs, early stops that free their workers."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import storage
from tests.jobs import Job, environment, records
from tests.s3 import S3Server

SEARCH = ["jobs/search.py", "--preset", "demo", "--method", "suponly", "--split", "1_8", "--optim.steps", "40"]
SEARCH += ["--eval.every", "10", "--run.log_every", "5", "--run.tensorboard", "false", "--scaling.cpus_per_worker", "2"]


@pytest.fixture
def _another_cluster(tmp_path: Path) -> Iterator[None]:
    """What looks like a node of another cluster on this machine: who searches for a cluster finds two."""
    (tmp_path / "raylet").symlink_to(sys.executable)
    script = ["-c", "import time; time.sleep(3600)", "--gcs-address=10.0.0.1:6379"]
    with subprocess.Popen([str(tmp_path / "raylet"), *script]) as process:
        yield
        process.kill()


@pytest.mark.night
@pytest.mark.usefixtures("_another_cluster")
def test_bad_samples_are_stopped_and_make_room(shapes: str, s3: S3Server, ray_folder: str, tmp_path: Path) -> None:
    """On two CPUs one run fits: a sample starts only if the one that was stopped before it has left nothing behind."""
    env, out = environment(ray_folder, s3), "s3://runs/search"
    flags = ["--data", shapes, "--out", out, "--space", "optim.lr=1e-9,0.003", "--samples", "3", "--asha"]
    command = [sys.executable, *SEARCH, *flags, "--optuna"]
    with Job(command, env, tmp_path / "first.log") as job:
        assert job.wait(480) == 0, job.said
        assert "Traceback" not in job.said
    trials = sorted({file.split("/")[1] for file in storage.list_files(out)})
    assert len(trials) == 3
    last = {name: _last_step(f"{out}/trials/{name}") for name in trials}
    done = [name for name in trials if storage.exists(f"{out}/trials/{name}/summary.json")]
    assert any(name.endswith("lr-0.003") for name in done)
    stopped = [name for name in trials if last[name] < 40]
    assert min(stopped) < max(trials)  # a later one needed its place
    assert job.said.splitlines()[-1].startswith("best: ")
    assert "lr-0.003," in job.said.splitlines()[-1]

    with Job(command, env, tmp_path / "again.log") as again:
        assert again.wait(480) == 0, again.said
    assert {name: _last_step(f"{out}/trials/{name}") for name in trials} == last  # what was stopped stays so
    assert again.said.splitlines()[-1] == job.said.splitlines()[-1]


def _last_step(trial: str) -> int:
    """Of its last evaluation."""
    return records(trial, "eval")[-1]["step"]


def test_mistakes_end_it_before_anything_starts(shapes: str, s3: S3Server, ray_folder: str, tmp_path: Path) -> None:
    env, out = environment(ray_folder, s3), str(tmp_path / "search")
    with Job(
        [sys.executable, *SEARCH, "--data", shapes, "--out", out, "--space", "optim.lrr=1..2"], env, tmp_path / "log"
    ) as job:
        assert job.wait() == 2, job.said
    assert "did you mean lr" in job.said.splitlines()[-1]
    assert not storage.list_files(out)
