"""The spot watcher against a metadata service over HTTP and a stand-in for `ray`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from cluster import spot_watcher
from tests.jobs import ROOT
from tests.s3 import free_ports
from tests.unit.cluster_files.metadata import Metadata

ACTION, PREEMPTED = "/latest/meta-data/spot/instance-action", "/computeMetadata/v1/instance/preempted"
SCRIPT = [sys.executable, "cluster/spot_watcher.py", "--interval", "0.1"]


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as service:
        yield service


def interruption(seconds: float, action: str = "terminate") -> tuple[int, str]:
    moment = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return 200, json.dumps({"action": action, "time": f"{moment:%Y-%m-%dT%H:%M:%SZ}"})


@pytest.fixture
def fake_ray(tmp_path: Path) -> Path:
    """A `ray` that writes down how it is called, and fails as often as the file `failures` has lines."""
    program = tmp_path / "bin" / "ray"
    program.parent.mkdir()
    program.write_text(f"""#!/bin/sh
printf '%s\\n' "$@" END >> {tmp_path}/calls
[ -s {tmp_path}/failures ] && sed -i 1d {tmp_path}/failures && echo 'the head is away' >&2 && exit 1
exit 0
""")
    program.chmod(0o755)
    return tmp_path


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[str]:
    """A process that looks like a raylet, so that no real one of this machine is told to drain; its temp dir."""
    (tmp_path / "raylet").symlink_to(sys.executable)
    script = ["-c", "import time; time.sleep(600)", "--node_id=" + "ab" * 28, "--gcs-address=10.0.0.1:6379"]
    with subprocess.Popen([str(tmp_path / "raylet"), *script, f"--temp_dir={tmp_path}"]) as process:
        yield str(tmp_path)
        process.kill()


def watcher(fake_ray: Path, *flags: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{fake_ray}/bin:{os.environ['PATH']}", "http_proxy": "http://127.0.0.1:1"}
    command = [*SCRIPT, "--temp-dir", str(fake_ray), *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def calls(fake_ray: Path) -> list[list[str]]:
    file = fake_ray / "calls"
    return [each.strip().split("\n") for each in file.read_text().split("END\n")[:-1]] if file.exists() else []


def test_ec2_says_nothing_then_something(metadata: Metadata) -> None:
    assert spot_watcher.aws_notice(metadata.url) is None
    metadata.answers[ACTION] = interruption(90)
    notice = spot_watcher.aws_notice(metadata.url)
    assert notice is not None
    assert notice.text == "EC2 will terminate this instance"
    assert 85 < notice.deadline - time.time() < 91
    assert all(allowed for _, _, allowed in metadata.requests)  # version 2: a token first, then sent along
    assert {method for method, _, _ in metadata.requests} == {"PUT", "GET"}
    assert "rebalance" not in str(metadata.requests)


def test_an_ec2_notice_without_a_readable_time_means_two_minutes(metadata: Metadata) -> None:
    metadata.answers[ACTION] = (200, '{"action": "stop", "time": "soon"}')
    notice = spot_watcher.aws_notice(metadata.url)
    assert notice is not None
    assert 115 < notice.deadline - time.time() < 121


def test_google_flag(metadata: Metadata) -> None:
    metadata.answers[PREEMPTED] = (200, "FALSE")
    assert spot_watcher.gcp_notice(metadata.url) is None
    metadata.answers[PREEMPTED] = (200, "TRUE\n")
    notice = spot_watcher.gcp_notice(metadata.url)
    assert notice is not None
    assert 25 < notice.deadline - time.time() < 31
    assert all(allowed for _, _, allowed in metadata.requests)


@pytest.mark.parametrize(
    "body", ["<html>log in</html>", "[]", "null", '"terminate"', "{}", "", "7"], ids=["html", *"lnsoe7"]
)
def test_nonsense_is_no_notice(metadata: Metadata, body: str) -> None:
    metadata.answers[ACTION] = metadata.answers[PREEMPTED] = (200, body)
    with pytest.raises(spot_watcher.Unavailable, match="no notice"):
        spot_watcher.aws_notice(metadata.url)
    with pytest.raises(spot_watcher.Unavailable, match="no preemption flag"):
        spot_watcher.gcp_notice(metadata.url)


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500, 503])
def test_error_answers_are_no_notice(metadata: Metadata, status: int) -> None:
    metadata.answers[ACTION] = (status, "TRUE")
    with pytest.raises(spot_watcher.Unavailable, match=f"answers {status}"):
        spot_watcher.aws_notice(metadata.url)


def test_a_service_that_hangs_is_given_up(metadata: Metadata) -> None:
    metadata.delay = 3
    began = time.monotonic()
    with pytest.raises(spot_watcher.Unavailable, match="timed out"):
        spot_watcher.ask(metadata.url, {}, timeout=0.3)
    assert time.monotonic() - began < 2


def test_a_machine_without_the_service_ends_it(fake_ray: Path) -> None:
    flags = ["--metadata-url", f"http://127.0.0.1:{free_ports(1)[0]}", "--patience", "0.5"]
    done = watcher(fake_ray, "--cloud", "aws", *flags)
    assert done.returncode == 2
    assert "no metadata service of aws here" in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 2  # the trouble is told once, not with every question
    assert calls(fake_ray) == []


def test_a_service_that_has_answered_may_be_away(metadata: Metadata) -> None:
    """Nothing, then trouble for longer than the patience, then a notice."""
    script = iter([None] * 2 + [spot_watcher.Unavailable("503")] * 8 + [spot_watcher.Notice("gone", 1.0)])

    def look() -> spot_watcher.Notice | None:
        told = next(script)
        if isinstance(told, Exception):
            raise told
        return told

    assert spot_watcher.watch(look, interval=0.02, patience=0.05) == spot_watcher.Notice("gone", 1.0)


def test_the_notice_becomes_a_drain_of_the_own_node(metadata: Metadata, fake_ray: Path, raylet: str) -> None:
    metadata.answers[ACTION] = interruption(100)
    done = watcher(fake_ray, "--cloud", "aws", "--metadata-url", metadata.url)
    assert done.returncode == 0, done.stderr
    (call,) = calls(fake_ray)
    assert call[:5] == ["drain-node", "--node-id", "ab" * 28, "--address", "10.0.0.1:6379"]
    assert call[5:9] == [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "EC2 will terminate this instance",
    ]
    assert call[9] == "--deadline-remaining-seconds"
    assert 80 <= int(call[10]) <= 90  # the training is to be elsewhere when the machine goes


def test_the_drain_is_repeated_while_it_fails(metadata: Metadata, fake_ray: Path, raylet: str) -> None:
    (fake_ray / "failures").write_text("1\n2\n")
    metadata.answers[PREEMPTED] = (200, "TRUE")
    done = watcher(fake_ray, "--cloud", "gcp", "--metadata-url", metadata.url)
    assert done.returncode == 0, done.stderr
    assert len(calls(fake_ray)) == 3
    assert done.stderr.count("drain-node: the head is away") == 2


def test_a_drain_that_never_succeeds_ends_with_one(metadata: Metadata, fake_ray: Path, raylet: str) -> None:
    (fake_ray / "failures").write_text("again\n" * 100)
    metadata.answers[ACTION] = interruption(2)
    done = watcher(fake_ray, "--cloud", "aws", "--metadata-url", metadata.url)
    assert done.returncode == 1
    assert "did not succeed in time" in done.stderr


def test_before_ray_has_started_it_waits_for_it(metadata: Metadata, fake_ray: Path) -> None:
    metadata.answers[ACTION] = interruption(2)
    done = watcher(fake_ray, "--cloud", "aws", "--metadata-url", metadata.url)
    assert done.returncode == 1
    assert "no Ray node runs here" in done.stderr
    assert calls(fake_ray) == []


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("python jobs/train.py --split 1_8", True),
        ("/opt/python3.11 -u /home/ray/u2pl-ray/jobs/sweep.py", True),
        ("python -m pipeline train", True),
        ("/opt/bin/python /opt/bin/u2pl train", True),
        ("python cluster/spot_watcher.py --end-jobs 90", False),
        ("python -m pytest tests/jobs.py", False),
        ("tail -f jobs/train.py", False),
        ("ray::Trainer", False),
        ("python", False),
    ],
)
def test_which_processes_are_jobs(line: str, is_one: bool, tmp_path: Path) -> None:
    processes = {"7": line.split(), "8": ["/bin/sh", "-c", line], "9": []}
    for pid, words in processes.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_text("".join(f"{word}\0" for word in words))
    assert spot_watcher.jobs(tmp_path) == ({7} if is_one else set())


def test_drain_now_asks_nobody_and_ends_with_the_node(fake_ray: Path, raylet: str) -> None:
    began = time.monotonic()
    done = watcher(fake_ray, "--drain-now", "3")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began >= 2.5  # the pod lives until then: time for a checkpoint
    assert len(calls(fake_ray)) == 1
