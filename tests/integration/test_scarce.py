"""Disks and memory that are used up: one line that says what to do, and the same command goes on later."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import checkpoint, storage
from pipeline.errors import UserError
from tests.jobs import Job, environment, records, train_command
from tests.s3 import S3Server

Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Makes disks in memory, with options such as size=1m or ro."""
    made: list[Path] = []

    def make(options: str) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"only root may mount a small disk: {done.stderr.strip()}")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_writing_to_disks_that_are_full_or_read_only(mount: Mount, tmp_path: Path) -> None:
    full = str(mount("size=64k"))
    storage.write_bytes(f"{full}/first", b"x" * 40_000)
    with pytest.raises(UserError, match=r"/second: no space is left on the disk: free some, or choose another place"):
        storage.write_bytes(f"{full}/second", b"x" * 40_000)
    assert storage.list_files(full) == ["first"], "no half file"
    with pytest.raises(UserError, match="the disk is read-only: choose another place"):
        storage.write_bytes(f"{mount('ro')}/file", b"x")
    with pytest.raises(UserError, match="the name is too long for the disk"):
        storage.write_bytes(f"{tmp_path}/{'x' * 300}", b"x")


@pytest.mark.night
def test_a_run_on_a_full_disk_ends_and_goes_on(
    shapes: str, s3: S3Server, ray_folder: str, mount: Mount, tmp_path: Path
) -> None:
    disk = mount("size=12m")  # holds one checkpoint of 4.5 MB and half of the second
    (disk / "other").write_bytes(b"x" * 5_000_000)
    run = str(disk / "run")
    command = train_command("--optim.steps", "9", "--run.checkpoint_every", "3", "--scaling.workers", "1")
    command += ["--data", shapes, "--out", run]
    with Job(command, environment(ray_folder, s3), tmp_path / "first.log") as job:
        assert job.wait() == 2, job.said
    last = job.said.splitlines()[-1]
    assert last.startswith(f"train.py: {run}/step_0000006/state.pt: no space is left on the disk"), job.said
    assert last.endswith("the same command goes on from the last checkpoint")
    assert "Traceback" not in job.said
    assert checkpoint.written(run) == ["step_0000003"]
    subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
    with Job(command, environment(ray_folder, s3), tmp_path / "second.log") as job:
        assert job.wait() == 0, job.said
    assert [record["step"] for record in records(run)] == list(range(1, 10))


@pytest.mark.night
def test_a_full_folder_of_temporary_files(
    shapes: str, s3: S3Server, ray_folder: str, mount: Mount, tmp_path: Path
) -> None:
    small = mount("size=1m")
    values = {**environment(ray_folder, s3), "TMPDIR": str(small)}
    command = train_command("--optim.steps", "3", "--scaling.workers", "1", "--data", shapes)
    with Job([*command, "--out", str(tmp_path / "run")], values, tmp_path / "log") as job:
        assert job.wait() == 2, job.said
    last = job.said.splitlines()[-1]
    assert last.startswith(f"train.py: {small}/checkpoint-"), job.said
    assert "no space is left on the disk: free some, or choose another place" in last
    assert "Traceback" not in job.said


def test_a_node_out_of_memory(shapes: str, s3: S3Server, ray_folder: str, tmp_path: Path) -> None:
    """Ray's memory monitor, told that a hundredth of the memory is all there is, ends what has begun last."""
    scarce = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    command = train_command("--run.max_failures", "0", "--data", shapes, "--out", str(tmp_path / "run"))
    with Job(command, {**environment(ray_folder, s3), **scarce}, tmp_path / "log") as job:
        assert job.wait() == 1, job.said
    assert "Traceback" not in job.said
    assert re.search(
        r"^train.py: the training failed: node \S+ ran out of memory \([\d.]+ of [\d.]+ GB used\): lower optim",
        job.said,
        re.M,
    )
