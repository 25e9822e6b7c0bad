"""A sweep as a user starts it: real Tune and Train, a killed driver, a trial that fails."""

import os
import signal
import sys
from pathlib import Path

from pipeline import storage
from pipeline.checkpoint import Progress, read_summary
from pipeline.config import cli
from pipeline.methods import OPTIONS
from pipeline.training.runtime import PlainRuntime
from pipeline.training.trainer import train
from tests.browser import PROGRAM, Browser
from tests.heads import Head
from tests.jobs import Job, has_checkpoint
from tests.processes import descendants, kill, wait_for

SWEEP = ["jobs/sweep.py", "--preset", "demo", "--splits", "1_8", "--optim.steps", "30", "--run.checkpoint_every", "10"]
SWEEP += ["--run.log_every", "5", "--run.tensorboard", "false"]


def _command(shapes: str, out: str, *flags: str) -> list[str]:
    return [sys.executable, *SWEEP, "--data", shapes, "--out", out, *flags]


def _summaries(out: str) -> dict[str, bytes]:
    files = [file for file in storage.list_files(out) if file.endswith("summary.json")]
    return {file: storage.read_bytes(storage.join(out, file)) for file in files}


def _begun(out: str) -> list[str]:
    """The trials that have a checkpoint and no result."""
    done = {file.split("/")[1] for file in _summaries(out)}
    trials = sorted({file.split("/")[1] for file in storage.list_files(out) if file.startswith("trials/")} - done)
    return [f"{out}/trials/{name}" for name in trials if has_checkpoint(f"{out}/trials/{name}")]


def _written(out: str, files: list[str]) -> list[int]:
    filesystem, path = storage.resolve(out)
    return [filesystem.get_file_info(f"{path}/{file}").mtime_ns for file in files]


def test_a_killed_sweep_goes_on_and_gives_what_one_gives_that_was_not(
    shapes: str, head: Head, joined: dict[str, str], tmp_path: Path
) -> None:
    """Two trials side by side: SupOnly is the first to end."""
    flags = ["--methods", "suponly,u2pl"]
    hurt = "s3://runs/hurt"
    with Job(_command(shapes, hurt, *flags), joined, tmp_path / "first.log") as job:
        wait_for("a finished trial, and one that has begun", lambda: _summaries(hurt) and _begun(hurt), 240)
        kill(job.pid, *head.workers, *descendants(job.pid))  # also what the head would end a moment later
    first, begun = _summaries(hurt), _begun(hurt)
    assert len(first) == len(begun) == 1, job.said
    stamps = _written(hurt, [*first])
    with Job(_command(shapes, hurt, *flags), joined, tmp_path / "second.log") as job:
        assert job.wait(480) == 0, job.said
        assert "Traceback" not in job.said
    assert _written(hurt, [*first]) == stamps  # nothing that was finished was made again
    (trial,) = begun
    assert f"resuming from {trial}/step_" in storage.read_bytes(f"{trial}/log.txt").decode()
    assert _scores(hurt) == {method: _calm(method, shapes, tmp_path) for method in ("suponly", "u2pl")}
    assert storage.read_bytes(f"{hurt}/report.html").startswith(b"<!doctype html>")
    assert len(storage.read_bytes(f"{hurt}/report.csv").splitlines()) == 3
    assert b"val mIoU last" in storage.read_bytes(f"{hurt}/trials/u2pl-1_8-s0/log.txt")
    if PROGRAM:  # else tests/integration/test_report.py says that it is missing
        (tmp_path / "report.html").write_bytes(storage.read_bytes(f"{hurt}/report.html"))
        _look_at(tmp_path / "report.html")


def _scores(out: str) -> dict[str, Progress]:
    """By method."""
    return {file.split("/")[1].partition("-")[0]: read_summary(storage.join(out, file)) for file in _summaries(out)}


def _calm(method: str, shapes: str, folder: Path) -> Progress:
    """What a trial gives to which nothing happened; one process without Ray does the same."""
    out = str(folder / method)
    flags = [*SWEEP[1:3], *SWEEP[5:], "--split", "1_8", "--method", method, "--data", shapes, "--out", out]
    return train(cli.parse_config(flags, "test", OPTIONS)[0], PlainRuntime(out))


def _look_at(page: Path) -> None:
    """The pictures of real networks on a phone."""
    with Browser() as browser:
        browser.open(page, 400)
        assert browser.complaints() == []
        assert browser.requests() == []
        assert browser.evaluate("document.querySelectorAll('img:not(.chart)').length") == 1
        assert browser.evaluate("document.querySelector('img:not(.chart)').naturalWidth") > 500
        said = browser.evaluate("document.querySelector('img:not(.chart)').alt")
        assert "Networks, from the left: suponly (split 1_8, seed 0), u2pl (split 1_8, seed 0)." in said
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400


def test_a_trial_that_fails_stops_no_other_and_is_told(shapes: str, joined: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "sweep")
    flags = ["--methods", "suponly", "--scaling.workers", "2"]
    flags += ["--grid", "optim.lr=0.003,1e30"]  # a loss that is not finite at once
    with Job(_command(shapes, out, *flags), joined, tmp_path / "log") as job:
        assert job.wait(480) == 1, job.said
    assert list(_summaries(out)) == ["trials/suponly-1_8-s0-optim.lr-0.003/summary.json"]
    assert "suponly-1_8-s0-optim.lr-1e30 failed: a loss is not finite" in job.said
    assert "1 of 2 trials failed" in job.said.splitlines()[-1]
    assert "Traceback" not in job.said
    assert "Failed trials" in (tmp_path / "sweep/report.md").read_text()


def test_why_a_trial_failed_is_told_whatever_it_was(
    shapes: str, head: Head, joined: dict[str, str], tmp_path: Path
) -> None:
    out = str(tmp_path / "sweep")
    flags = ["--methods", "suponly", "--scaling.workers", "1", "--optim.steps", "100000", "--run.max_failures", "0"]
    with Job(_command(shapes, out, *flags), joined, tmp_path / "log") as job:
        wait_for("its first steps", lambda: storage.exists(f"{out}/trials/suponly-1_8-s0/metrics.jsonl") or job.ended)
        kill(*head.workers)
        assert job.wait(240) == 1, job.said
    (line,) = [line for line in job.said.splitlines() if line.startswith("suponly-1_8-s0 failed: ")]
    assert not line.endswith("None")
    assert "Traceback" not in job.said
    assert "the training failed: " in line
    assert line.partition("failed: ")[2] in (tmp_path / "sweep/trials/suponly-1_8-s0/log.txt").read_text()


def test_an_interrupted_sweep_does_not_seem_done(shapes: str, joined: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "sweep")
    with Job(_command(shapes, out, "--methods", "suponly", "--optim.steps", "100000"), joined, tmp_path / "log") as job:
        wait_for("its first steps", lambda: storage.exists(f"{out}/trials/suponly-1_8-s0/metrics.jsonl") or job.ended)
        os.kill(job.pid, signal.SIGINT)
        assert job.wait() == 130, job.said
    assert "Traceback" not in job.said
    assert not (tmp_path / "sweep/report.html").exists()


def test_mistakes_end_it_before_any_trial_starts(shapes: str, joined: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "sweep")
    for flags, words in ((["--methods", "suponly,u2pk"], "'u2pk'"), (["--splits", "1_8,1_7"], "'1_7'")):
        with Job(_command(shapes, out, *flags), joined, tmp_path / "log") as job:
            assert job.wait() == 2, job.said
        assert words in job.said.splitlines()[-1]
    assert not storage.list_files(out)
