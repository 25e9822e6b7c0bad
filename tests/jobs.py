"""The jobs as a user starts them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from pipeline import storage
from tests.processes import descendants, kill
from tests.s3 import S3Server

ROOT = Path(__file__).parents[1]
SHORT = ["--preset", "demo", "--split", "1_16", "--run.log_every", "1", "--run.tensorboard", "false"]
"""Flags of a run that tells of every step."""


class Job:
    """A job as a user starts it, with everything below it ended at the end of the block."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path, *, group: bool = False) -> None:
        """Args: group: the job is the first of a group of processes, as a shell makes it."""
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                arguments, cwd=ROOT, env={**environment, "PYTHONFAULTHANDLER": "1"}, stdout=out, stderr=out,
                start_new_session=group,
            )  # fmt: skip
        self.pid = self._process.pid

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        kill(*descendants(self.pid), self.pid)
        self._process.wait()

    def wait(self, seconds: float = 240) -> int:
        """The exit code. A job that still runs then says where each of its threads is, as the last of its log."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(self.pid, signal.SIGABRT)
            self._process.wait()
            raise AssertionError(f"still ran after {seconds:g} s: {self.said}") from None

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def said(self) -> str:
        return self.log.read_text()


def train_command(*flags: str) -> list[str]:
    """A short run as a user starts it."""
    return [sys.executable, "jobs/train.py", *SHORT, *flags]


def records(run: str, kind: str = "train") -> list[dict]:
    """What a run has written to metrics.jsonl."""
    lines = storage.read_bytes(storage.join(run, "metrics.jsonl")).decode().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def has_checkpoint(run: str) -> bool:
    """Whether Ray Train has registered one."""
    uri = storage.join(run, "checkpoint_manager_snapshot.json")
    return storage.exists(uri) and b"step_" in storage.read_bytes(uri)


def environment(ray_folder: str, s3: S3Server) -> dict[str, str]:
    """What a job finds in its environment: this Python's programs, the storage, a Ray of its own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **s3.environment(), "RAY_TMPDIR": ray_folder, "PATH": path}
