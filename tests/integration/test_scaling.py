"""The number of workers follows the cluster: a node goes with notice, another one comes."""

import itertools
import re
import subprocess
from pathlib import Path

import pytest

from pipeline import storage
from tests.heads import head_command, node_command, nodes
from tests.jobs import Job, environment, has_checkpoint, records, train_command
from tests.processes import descendants, kill, wait_for
from tests.s3 import S3Server, free_ports

QUICK = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
"""Losses are seen soon."""
ONE_EACH = ["--scaling.workers", "1..2", "--scaling.cpus_per_worker", "0.7"]
"""Nodes of one CPU hold one worker and a reading task."""
EVERY = 200
"""Steps between checkpoints."""


@pytest.mark.night
def test_a_run_shrinks_and_grows(shapes: str, s3: S3Server, ray_folder: str, tmp_path: Path) -> None:
    """Nothing is charged to the failure budget, and no step is left out."""
    (gcs,) = free_ports(1)
    run, env = "s3://runs/elastic", {**environment(ray_folder, s3), **QUICK}
    inside = {**env, "RAY_ADDRESS": f"127.0.0.1:{gcs}", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
    flags = ["--data", shapes, "--out", run, "--optim.steps", "100000", "--u2pl.warmup", "5", *ONE_EACH]
    command = train_command(
        *flags, "--run.checkpoint_every", str(EVERY), "--eval.every", "100000", "--run.max_failures", "0"
    )
    with (
        Job(head_command(gcs, cpus=1), env, tmp_path / "head.log"),
        Job(node_command(gcs, cpus=1), env, tmp_path / "first.log") as first,
    ):
        (head_id,) = wait_for("the head", lambda: nodes(inside, 1))
        (node_id,) = set(wait_for("a second node", lambda: nodes(inside, 2))) - {head_id}
        with Job(command, inside, tmp_path / "job.log") as job:
            wait_for("some steps", lambda: storage.exists(f"{run}/metrics.jsonl") and len(records(run)) > 20)
            assert not has_checkpoint(run)
            _drain(node_id, inside)
            wait_for("the resumed run", lambda: _counts(run) == [2, 1] or job.ended)
            assert "1 node(s) will be taken away within" in job.said
            kill(first.pid, *descendants(first.pid))
            with Job(node_command(gcs, cpus=1), env, tmp_path / "second.log"):
                wait_for("two workers again", lambda: _counts(run) == [2, 1, 2] or job.ended)
            assert not job.ended, job.said
    assert [record["step"] for record in records(run)] == list(range(1, records(run)[-1]["step"] + 1))
    shrunk, grown = _repeated(job.said)
    assert shrunk < EVERY  # no checkpoint but those that the notice led to
    assert grown < EVERY / 4  # a group is resized when a checkpoint has arrived, not at any time


def _repeated(said: str) -> list[int]:
    """How many steps were done again at each resume; none if it was right after the checkpoint."""
    before, repeated = 0, []
    for step, resumed in re.findall(r"^step +(\d+)/|^resuming from \S+, step (\d+)", said, re.MULTILINE):
        if resumed:
            repeated.append(before - int(resumed))
        before = int(step or resumed)
    return repeated


def _drain(node: str, env: dict[str, str]) -> None:
    """The notice that a cloud gives, as the watcher on the node passes it on."""
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command = ["ray", "drain-node", "--address", env["RAY_ADDRESS"], "--node-id", node, *why]
    subprocess.run([*command, "--deadline-remaining-seconds", "15"], env=env, check=True, capture_output=True)


def _counts(run: str) -> list[int]:
    """Numbers of workers, each change once."""
    return [count for count, _ in itertools.groupby(record["workers"] for record in records(run))]
