"""What a run on a fleet has done so far, from its log and the storage."""

import itertools
import json
import re

from tests.cluster.fleet import Fleet
from tests.cluster.site import Submitted

STEPS, EVERY = 120, 10
"""Of a run, and between its checkpoints."""
FLAGS = ["--u2pl.warmup", "5", "--run.checkpoint_every", str(EVERY), "--scaling.cpus_per_worker", "1.5"]
TWO = [*FLAGS, "--optim.steps", str(STEPS), "--scaling.workers", "2"]


def curve(fleet: Fleet, run: str) -> list[dict]:
    """Step and losses of a run, as they stand in the storage."""
    text = fleet.read(f"{run}/metrics.jsonl")
    assert text is not None
    records = [record for line in text.splitlines() if (record := json.loads(line))["kind"] == "train"]
    return [{key: record[key] for key in ("step", "total", "loss", "lr")} for record in records]


def registered(fleet: Fleet, run: str) -> bool:
    """Whether a run has a checkpoint to go on from."""
    return b"step_" in (fleet.read(f"{run}/checkpoint_manager_snapshot.json") or b"")


def counts(fleet: Fleet, run: str) -> list[int]:
    """Numbers of workers of a run, each change once."""
    lines = (fleet.read(f"{run}/metrics.jsonl") or b"").splitlines()
    return [count for count, _ in itertools.groupby(json.loads(line)["workers"] for line in lines)]


def checkpoints(fleet: Fleet, run: str) -> set[int]:
    """The steps of a run's whole checkpoints."""
    return {int(found[1]) for file in fleet.files(run) if (found := re.match(r"step_(\d+)/checkpoint.json", file))}


def resumed_from(job: Submitted) -> list[int]:
    """The steps from which the job went on."""
    return [int(step) for step in re.findall(r"resuming from \S+, step (\d+)", job.said)]
