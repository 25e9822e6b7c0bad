"""A training on real hosts loses workers, hosts, cables, its storage and its head, and ends as if nothing had been.

All runs are one run: same config, same data. The curve of each must be that of the undisturbed one, to the last bit.
"""

import json
import time
from pathlib import Path

import pytest

from cluster.spot_watcher import MARGIN_S
from pipeline.checkpoint import name
from tests.cluster.fleet import TRAIN_WORKER, Fleet
from tests.cluster.runs import STEPS, TWO, checkpoints, curve, registered, resumed_from
from tests.cluster.site import Submitted, training
from tests.hosts import Host
from tests.processes import held, kill, wait_for

NOTICE = 30
"""Seconds between the notice and the end of a preempted host."""


@pytest.fixture(scope="module")
def calm(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the undisturbed run tells of its steps; the others are submitted by jobs/submit.py."""
    log = tmp_path_factory.mktemp("calm") / "log"
    job = fleet.submit(log, "python", *training("s3://runs/calm", *TWO))
    wait_for("two workers on two hosts", lambda: len(fleet.training) == 2 or job.over, 300)
    assert job.wait(600) == 0, job.said
    return curve(fleet, "s3://runs/calm")


def begun(fleet: Fleet, log: Path, run: str, *flags: str) -> Submitted:
    """A job that has a checkpoint and is far from its end."""
    job = fleet.train(log, run, *(flags or TWO))
    wait_for("a checkpoint", lambda: registered(fleet, run) or job.over, 300)
    assert not job.over, job.said
    assert job.step < STEPS * 2 / 3, "the fault would come too late"
    return job


def ended_well(fleet: Fleet, job: Submitted, run: str, calm: list[dict]) -> None:
    """As the undisturbed run: no step left out, none twice."""
    assert job.wait(600) == 0, job.said
    assert "Traceback" not in job.said, job.said
    assert curve(fleet, run) == calm
    summary = fleet.read(f"{run}/summary.json")
    assert summary is not None
    assert json.loads(summary)["step"] == STEPS
    assert fleet.read(f"{run}/{name(STEPS)}/state.pt")


class TestRefused:
    URL = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], headers=dict([sys.argv[2].split(': ')])))"

    @pytest.mark.parametrize(("header", "code"), [("X-Other: x", 401), ("Authorization: Bearer wrong", 403)])
    def test_requests(self, fleet: Fleet, header: str, code: int) -> None:
        url = f"http://{fleet.head.address}:8265/api/jobs/"
        done = fleet.client.run("python", "-c", self.URL, url, header, check=False)
        assert f"HTTP Error {code}" in done.stdout
        fleet.client.run("python", "-c", self.URL, url, f"Authorization: Bearer {fleet.token}")

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
            ({"RAY_AUTH_TOKEN": "f" * 64}, "Invalid authentication token"),
        ],
    )
    def test_jobs(self, fleet: Fleet, tmp_path: Path, environment: dict[str, str], message: str) -> None:
        job = fleet.submit(tmp_path / "log", "python", "-c", "print('it ran')", **environment)
        assert job.wait() != 0
        assert message.lower() in job.said.lower()
        assert "it ran" not in job.said

    def test_hosts(self, fleet: Fleet) -> None:
        host = fleet.network.host("stranger")
        join = ("ray", "start", f"--address={fleet.head.address}:6379", f"--node-ip-address={host.address}")
        try:
            done = host.run(*join, check=False, seconds=300, RAY_AUTH_TOKEN="f" * 64)
            assert done.returncode != 0
            assert "token" in done.stdout
        finally:
            host.power_off()


def test_a_train_worker_is_killed(whole: Fleet, calm: list[dict], tmp_path: Path) -> None:
    job = begun(whole, tmp_path / "log", run := "s3://runs/worker")
    kill(whole.training[0].find(TRAIN_WORKER)[0])
    ended_well(whole, job, run, calm)
    assert "was lost" in job.said
    assert len(resumed_from(job)) == 1


def test_a_raylet_is_killed(whole: Fleet, calm: list[dict], tmp_path: Path) -> None:
    job = begun(whole, tmp_path / "log", run := "s3://runs/raylet")
    kill(whole.training[0].find("raylet/raylet")[0])
    ended_well(whole, job, run, calm)
    assert len(resumed_from(job)) == 1


def test_a_host_loses_power(whole: Fleet, calm: list[dict], tmp_path: Path) -> None:
    job = begun(whole, tmp_path / "log", run := "s3://runs/power")
    whole.training[0].power_off()
    ended_well(whole, job, run, calm)
    assert len(resumed_from(job)) == 1


def test_a_cable_is_pulled(whole: Fleet, calm: list[dict], tmp_path: Path) -> None:
    job = begun(whole, tmp_path / "log", run := "s3://runs/cable", *TWO, "--run.tensorboard", "true")
    (cut,) = [host for host in whole.training if writes(host)]
    cut.unplug()
    ended_well(whole, job, run, calm)
    assert len(resumed_from(job)) == 1
    files = whole.files(run)
    cut.plug()  # what it was doing when it was cut off must not come after all
    wait_for("the end of the host's node", lambda: not cut.find("raylet/raylet") and not cut.find(TRAIN_WORKER), 300)
    assert whole.files(run) == files
    assert curve(whole, run) == calm


def test_a_cable_is_out_for_a_while(whole: Fleet, calm: list[dict], tmp_path: Path) -> None:
    """For about as long as a host may be silent: whoever has its place then, one of the two writes."""
    job = begun(whole, tmp_path / "log", run := "s3://runs/loose", *TWO, "--run.tensorboard", "true")
    (cut,) = [host for host in whole.training if writes(host)]
    cut.unplug()
    time.sleep(20)  # this is the scenario, not a wait for something
    cut.plug()
    ended_well(whole, job, run, calm)
    assert len(resumed_from(job)) <= 1
    files = whole.files(run)
    wait_for("the end of the host's worker", lambda: not cut.find(TRAIN_WORKER), 300)
    assert whole.files(run) == files
    assert curve(whole, run) == calm


def writes(host: Host) -> bool:
    """Whether it has the first of a run's workers: the one that writes records, and events on their way to S3."""
    return host.run("sh", "-c", "ls /tmp/*/events.*", check=False).returncode == 0


def test_the_storage_is_cut_off(whole: Fleet, calm: list[dict], tmp_path: Path) -> None:
    job = begun(whole, tmp_path / "log", run := "s3://runs/storage")
    whole.s3.unplug()
    time.sleep(10)  # this is the scenario, not a wait for something
    whole.s3.plug()
    ended_well(whole, job, run, calm)
    assert resumed_from(job) == []


def test_a_host_is_drained(whole: Fleet, calm: list[dict], tmp_path: Path) -> None:
    flags = ["--run.checkpoint_every", str(10 * STEPS), "--run.max_failures", "0"]
    job = whole.train(tmp_path / "log", run := "s3://runs/drain", *TWO, *flags)
    wait_for("some steps", lambda: job.step >= STEPS / 6 or job.over, 300)
    assert not checkpoints(whole, run)  # the config asks for none: what comes now is because of the notice
    host, other = whole.training
    (worker,) = other.find(TRAIN_WORKER)  # a fast machine is through before the deadline, if nobody holds it
    noticed = time.monotonic()
    with held(worker):
        drain(host)
    late = STEPS * 2 / 3
    wait_for("a checkpoint", lambda: registered(whole, run) or job.step >= late or job.over, NOTICE)
    assert checkpoints(whole, run)
    assert max(checkpoints(whole, run)) < STEPS
    told = noticed + NOTICE - MARGIN_S
    wait_for("the last steps, or the end", lambda: job.step >= late or time.monotonic() >= told)
    with held(worker):
        time.sleep(max(0.0, told - time.monotonic()))
    wait_for("the training to leave the host", lambda: not host.find(TRAIN_WORKER), MARGIN_S)
    host.power_off()  # as the cloud does
    ended_well(whole, job, run, calm)
    (resumed,) = resumed_from(job)
    assert 0 < resumed < STEPS


def drain(host: Host) -> None:
    """What the spot watcher makes of the notice that a cloud gives before it takes a host."""
    words = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
    host.run("ray", "drain-node", *words, "--deadline-remaining-seconds", f"{NOTICE - MARGIN_S:g}")


def test_the_head_is_lost(whole: Fleet, calm: list[dict], tmp_path: Path) -> None:
    job = begun(whole, tmp_path / "first", run := "s3://runs/head")
    whole.head.power_off()
    assert job.wait(120) == 1
    assert "lost the cluster" in job.said
    assert "Traceback" not in job.said
    for host in whole.workers:
        host.power_off()
    whole.start_head()
    whole.replace_lost()
    again = whole.train(tmp_path / "second", run, *TWO)
    ended_well(whole, again, run, calm)
    assert len(resumed_from(again)) == 1
