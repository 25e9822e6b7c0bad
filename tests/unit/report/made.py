"""Run directories as training leaves them, without training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.cli import resolve
from pipeline.config.schema import as_dict
from pipeline.datasets.prepared.splits import FRACTIONS
from pipeline.methods import OPTIONS
from pipeline.report.compare import Comparison, compare
from pipeline.report.runs import find_runs, read_run

CLASSES = ("sky", "road")
MACHINE = {"device": "cpu", "processor": "Abacus", "cpus": 2, "python": "3.11", "torch": "2.14", "ray": "2.60"}
WORKERS = {"workers": 2, "worker_cpus": 1.0, "worker_gpus": 0.0}
ABOUT = {"dataset": "toy", "protocol": "random", **WORKERS, **MACHINE}


def write_run(
    folder: Path,
    method: str = "suponly",
    split: str = "1_4",
    seed: int = 0,
    scores: Sequence[float] = (0.5,),
    *,
    finished: bool = True,
    ended: int | None = None,
    config: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    logs: Mapping[str, Any] | None = None,
) -> str:
    """A run of 100 steps whose i-th evaluation, after 10 i steps, gave `scores[i]`; returns its place.

    Args:
        folder: where.
        method: of the config.
        split: of the config.
        seed: of the config.
        scores: mIoU 0..1; the first class is 0.1 above, the second 0.1 below.
        finished: whether there is a summary.
        ended: after which step; None: the last one.
        config: more keys.
        data: replaces what the checkpoint says of the data; empty: there is no checkpoint.
        about: more of what the run is made of.
        logs: more in each training record; what may be called is, with the step.
    """
    folder.mkdir(parents=True)
    values = {"method": method, "split": split, "seed": seed, "optim": {"steps": 100}, "data": {"root": "/no/toy"}}
    values |= config or {}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    evaluations = [_evaluation(10 * at, score) for at, score in enumerate(scores, 1)]
    lines = []
    for each in evaluations:
        more = {name: value(each["step"]) if callable(value) else value for name, value in (logs or {}).items()}
        train = {"kind": "train", "step": each["step"], "total": 1.0, "worker_seconds": 1800.0, **more}
        lines += [train, {"kind": "eval", **each, "worker_seconds": 1800.0}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if finished:
        step = ended or values["optim"].get("steps", 100)
        best = max(evaluations, key=lambda each: each["miou"]["teacher"])
        (folder / "summary.json").write_text(json.dumps({"step": step, "last": evaluations[-1], "best": best}))
    known = {"index": "abc" * 20, "split": f"list-{split}", "classes": CLASSES} if data is None else data
    if known:
        place = folder / "step_0000010"
        place.mkdir()
        resolved = as_dict(resolve(values, OPTIONS))
        meta = {"step": 10, "sha256": "", "version": "1.0", "data": known, "config": resolved}
        labeled = round(400 / FRACTIONS.get(split, 4))
        meta["about"] = {**ABOUT, "labeled": labeled, "unlabeled": 400 - labeled, **(about or {})}
        (place / "checkpoint.json").write_text(json.dumps(meta))
    return str(folder)


def _evaluation(step: int, score: float) -> dict[str, Any]:
    return {"step": step, "miou": {"teacher": score, "student": 0.0}, "iou": [score + 0.1, score - 0.1]}


def compared(*places: Path | str) -> list[Comparison]:
    """What the report makes of places."""
    return compare([read_run(uri, OPTIONS) for uri in find_runs(list(map(str, places)))], OPTIONS)


def only(*places: Path | str) -> Comparison:
    """The same where all runs belong together."""
    (comparison,) = compared(*places)
    return comparison
