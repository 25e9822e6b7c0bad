"""A checkpoint under way meets SIGKILL at every point, and a storage that takes none: nothing is lost but steps."""

import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint, storage
from pipeline.config import cli
from pipeline.methods import OPTIONS
from pipeline.training.recovery import RECORD_FILE
from pipeline.training.runtime import PlainRuntime
from pipeline.training.trainer import train
from tests.heads import Head
from tests.jobs import SHORT, Job, records, train_command
from tests.processes import kill, wait_for
from tests.proxy import FaultProxy
from tests.s3 import S3Server

STEPS, EVERY = 30, 2
SLOW = 400
"""Seconds that a start may take on a loaded machine."""
FLAGS = [
    *("--optim.steps", str(STEPS), "--run.checkpoint_every", str(EVERY), "--u2pl.warmup", "5"),
    *("--scaling.workers", "1"),
]


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """The way of the jobs to the storage; the tests look at it directly."""
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server, proxy: FaultProxy) -> Iterator[Head]:
    """A Ray whose processes go through the proxy as well; each start of one would cost more than a run."""
    ours = {**s3_server.environment(), "AWS_ENDPOINT_URL": proxy.endpoint}
    with (
        tempfile.TemporaryDirectory(prefix="u2pl-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        Head(folder, cpus=2, **ours) as head,
    ):
        yield head


@pytest.fixture
def environment(s3_server: S3Server, proxy: FaultProxy, cluster: Head) -> dict[str, str]:
    """Of jobs that join it."""
    ours = {**s3_server.environment(), "AWS_ENDPOINT_URL": proxy.endpoint}
    return {**cluster.environment, **ours, "RAY_ADDRESS": cluster.gcs}


@pytest.fixture(autouse=True)
def _calm(proxy: FaultProxy, bucket: str) -> Iterator[None]:
    del bucket  # the clients of this process are made anew
    yield
    proxy.set()
    proxy.counts.clear()


@pytest.fixture(scope="module")
def calm(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The last checkpoint of a run that nothing happened to, in one process without Ray."""
    run = str(tmp_path_factory.mktemp("calm") / "run")
    config, _ = cli.parse_config([*SHORT, *FLAGS, "--data", shapes, "--out", run], "test", OPTIONS)
    train(config, PlainRuntime(run))
    return f"{run}/{checkpoint.name(STEPS)}"


def ended_well(run: str, calm: str) -> None:
    """As the undisturbed run: the same state bit for bit, every record once, two checkpoints and nothing half."""
    states = [checkpoint.read_state(uri) for uri in (f"{run}/{checkpoint.name(STEPS)}", calm)]
    for part in ("method", "optimizer"):
        first, second = (dict(flat(state[part])) for state in states)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 1))
    names = [checkpoint.name(step) for step in (STEPS - EVERY, STEPS)]
    files = [file for file in storage.list_files(run) if file.startswith("step_")]
    assert files == [f"{name}/{file}" for name in names for file in ("checkpoint.json", "state.pt")]
    for name in names:
        checkpoint.verify(f"{run}/{name}")


def flat(tree: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The numbers of nested states, as tensors."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flat(value, f"{path}/{key}")
    elif isinstance(tree, torch.Tensor | int | float):
        yield path, torch.as_tensor(tree)


POINTS = {
    "before state.pt": ("silent", "POST ", f"/{checkpoint.name(2 * EVERY)}/state.pt?uploads"),
    "within state.pt": ("half", "PUT ", f"/{checkpoint.name(3 * EVERY)}/state.pt?partNumber"),
    "at the end of state.pt": ("silent", "POST ", f"/{checkpoint.name(4 * EVERY)}/state.pt?uploadId"),
    "before checkpoint.json": ("silent", "POST ", f"/{checkpoint.name(5 * EVERY)}/checkpoint.json?uploads"),
    "before Ray's record": ("silent", "POST ", f"/{RECORD_FILE}?uploads"),
    "before old ones are deleted": ("silent", "POST ", "?delete"),
}
"""Where a run is killed: which request does not get through, or only half of it."""


@pytest.mark.night
def test_killed_at_every_point_of_a_checkpoint(
    shapes: str, proxy: FaultProxy, cluster: Head, environment: dict[str, str], calm: str, tmp_path: Path
) -> None:
    """One run, started again after each kill, which meets it at the next point."""
    run, newest = "s3://runs/points", None
    command = train_command(*FLAGS, "--data", shapes, "--out", run)
    for point, (fault, *parts) in POINTS.items():
        with Job(command, environment, tmp_path / f"{point}.log") as job:
            if RECORD_FILE in parts[-1]:  # it is also written before the workers start
                wait_for("the workers", lambda job=job: "resuming from" in job.said or job.ended, SLOW)
            proxy.set(fault, *parts)
            wait_for(point, lambda job=job, fault=fault: proxy.counts[fault] or job.ended, SLOW)
            kill(job.pid, *cluster.controllers, *cluster.workers)
            assert job.wait() == -signal.SIGKILL, job.said
        went_on(job, newest)
        wait_for("the end of the workers", lambda: not cluster.workers)
        proxy.set()
        proxy.counts.clear()
        before, newest = newest, checkpoint.newest(run)
        assert newest != before, f"killed {point}: no checkpoint is new"
    storage.delete(f"{run}/{checkpoint.written(run)[-1]}/state.pt")  # as if half of the deleting had been done
    with Job(command, environment, tmp_path / "last.log") as job:
        assert job.wait(SLOW) == 0, job.said
    went_on(job, newest)
    ended_well(run, calm)


def went_on(job: Job, newest: str | None) -> None:
    """A job began where the newest whole checkpoint is."""
    assert "Traceback" not in job.said
    assert re.findall(r"resuming from (\S+),", job.said) == [newest] * bool(newest), job.said


@pytest.mark.night
def test_a_storage_that_takes_no_checkpoint(
    shapes: str, proxy: FaultProxy, environment: dict[str, str], calm: str, tmp_path: Path
) -> None:
    """Beyond the patience the run ends, and goes on later; within it nothing happens but a later upload."""
    run = "s3://runs/uploads"
    command = train_command(*FLAGS, "--data", shapes, "--out", run)
    first, second, last = (f"{run}/{checkpoint.name(step)}" for step in (EVERY, 2 * EVERY, STEPS - 2 * EVERY))
    proxy.set("refuse", f"/{checkpoint.name(2 * EVERY)}/state.pt")
    with Job([*command, "--run.storage_patience", "4"], environment, tmp_path / "first.log") as job:
        assert job.wait(SLOW) == 2, job.said
    went_on(job, None)
    assert re.fullmatch(
        rf"train\.py: {second}/state\.pt: the endpoint does not answer: check AWS_ENDPOINT_URL \(waited \d+ s\); "
        r"once that is mended, the same command goes on from the last checkpoint",
        job.said.splitlines()[-1],
    )
    assert "was lost" not in job.said  # workers in its place would only have waited again
    newest = checkpoint.newest(run)  # the one before, or one that got through until the workers had ended
    assert newest is not None
    assert newest != second
    assert checkpoint.verify(first).step == EVERY

    proxy.set("reset", "PUT ", f"/{checkpoint.name(STEPS - EVERY)}/state.pt")
    with Job(command, environment, tmp_path / "second.log") as job:
        often = 2 * storage.REQUEST_ATTEMPTS  # so often that the storage's client has given up
        wait_for("trouble with the upload", lambda: proxy.counts["reset"] > often or job.ended, SLOW)
        wait_for("the steps after it", lambda: f"step     {STEPS}/{STEPS}" in job.said or job.ended, SLOW)
        assert checkpoint.newest(run) == last, job.said
        proxy.set()
        assert job.wait(SLOW) == 0, job.said
    went_on(job, newest)
    ended_well(run, calm)
