"""Half an hour in which something dies every minute: the model is the one of a run that nothing happened to.

Every kill is drawn from a seed, so that a failure can be had again.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint, storage
from tests.heads import Head, nodes
from tests.jobs import Job, records, train_command
from tests.processes import descendants, kill, named, wait_for
from tests.s3 import S3Server

STEPS_A_MINUTE = 200
"""Of the run's length: with a kill a minute, about what two cores make."""
AWAY_SECONDS = 8.0
"""For which a killed server is away."""


class Field:
    """A server, a head and two nodes, of which each may die."""

    def __init__(self, head: Head, server: S3Server, command: list[str], log: Path) -> None:
        self.log = log
        self._head, self._server, self._command = head, server, command
        self._nodes = 0
        self.job: Job
        for _ in range(2):
            self._add_node()
        wait_for("two nodes beside the head", lambda: nodes(self.environment, 3))

    def start(self) -> None:
        """The run's command, anew."""
        self.job = Job(self._command, self.environment, self.log)

    @property
    def environment(self) -> dict[str, str]:
        """Of a job that joins the head."""
        return {**self._head.environment, **self._server.environment(), "RAY_ADDRESS": self._head.gcs}

    @property
    def lines(self) -> int:
        """How many steps the run has told of, repeated ones included."""
        return self.job.said.count("\nstep ")

    def worker(self, draw: random.Random) -> None:
        """One of the processes that train."""
        workers = sorted(self._head.workers)
        if workers:
            kill(draw.choice(workers))

    def node(self, draw: random.Random) -> None:
        """A Ray node with all that runs on it; another one takes its place."""
        process = draw.choice(self._head.nodes)
        kill(*named(process.pid, "raylet"))
        self._add_node()

    def driver(self, draw: random.Random) -> None:
        """The job's own process; somebody gives its command again."""
        del draw
        kill(self.job.pid, *descendants(self.job.pid))
        self.job.wait()
        self.start()

    def store(self, draw: random.Random) -> None:
        """The S3 server, which comes back with what was written."""
        del draw
        self._server.kill()
        time.sleep(AWAY_SECONDS)
        self._server.bring_back()

    def _add_node(self) -> None:
        self._nodes += 1
        self._head.add_node(f"node{self._nodes}", cpus=2)


KINDS = (Field.worker, Field.node, Field.driver, Field.store)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One that may be killed."""
    with S3Server(tmp_path_factory.mktemp("soak")) as server:
        yield server


@pytest.mark.night
def test_a_kill_a_minute_changes_nothing(
    pytestconfig: pytest.Config, shapes: str, server: S3Server, ray_folder: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    minutes = float(pytestconfig.getoption("--soak") or 0)
    draw, deaths, last = random.Random(0), Counter[str](), round(STEPS_A_MINUTE * minutes)
    kinds: list[Callable[[Field, random.Random], None]] = []
    for key, value in server.environment().items():
        monkeypatch.setenv(key, value)
    storage.reconnect()
    flags = ["--optim.steps", str(last), "--eval.every", str(last), "--run.checkpoint_every", "20", "--u2pl.warmup"]
    flags += ["0.1", "--run.max_failures", "1000", "--scaling.workers", "2", "--data", shapes]
    hurt, calm = "s3://runs/hurt", "s3://runs/calm"
    with Head(ray_folder, cpus=0) as head:
        field = Field(head, server, train_command(*flags, "--out", hurt), tmp_path / "hurt.log")
        field.start()
        until = time.monotonic() + 60 * minutes
        while not field.job.ended and time.monotonic() < until:
            time.sleep(60)  # what the test is about: a minute between two kills
            if field.job.ended:
                break
            kinds = kinds or draw.sample(KINDS, len(KINDS))  # each as often as the others
            kind, before, began = kinds.pop(), field.lines, time.monotonic()
            deaths[kind.__name__] += 1
            kind(field, draw)
            wait_for("the next step", lambda before=before: field.lines > before or field.job.ended, 300)
            print(f"line {before}: {kind.__name__}, {time.monotonic() - began:.0f} s to the next step", flush=True)
        assert field.job.wait(60 * minutes + 600) == 0, field.job.said
        assert "Traceback" not in field.job.said, field.job.said
        assert sum(deaths.values()) > minutes / 3, deaths
        with Job(train_command(*flags, "--out", calm), field.environment, tmp_path / "calm.log") as job:
            assert job.wait(60 * minutes + 600) == 0, job.said
    first, second = (checkpoint.read_state(f"{run}/{checkpoint.name(last)}") for run in (hurt, calm))
    for part in ("method", "optimizer"):
        assert_equal(first[part], second[part])
    assert first["progress"] == second["progress"]
    assert [record["step"] for record in records(hurt)] == list(range(1, last + 1))
    print(f"{last} steps, {sum(deaths.values())} kills: {dict(deaths)}")


def assert_equal(one: object, other: object) -> None:
    """Nested values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, list):
        assert isinstance(other, list)
        for mine, its in zip(one, other, strict=True):
            assert_equal(mine, its)
    else:
        assert one == other
