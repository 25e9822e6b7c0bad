"""Runs of a few steps in one plain process, for the tests of the loop."""

import json
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.batch import Batch
from pipeline.config.cli import resolve
from pipeline.config.schema import Config
from pipeline.methods import OPTIONS, Losses, Step
from pipeline.methods.suponly import SupOnly
from pipeline.training import trainer
from pipeline.training.runtime import PlainRuntime


def config_of(root: str, out: Path, method: str = "suponly", **sections: dict[str, Any]) -> Config:
    """A run of six steps with one checkpoint in between."""
    values: dict[str, dict[str, Any]] = {
        "data": {"root": root, "crop": [32, 32]},
        "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8},
        "optim": {"steps": 6, "batch_labeled": 2, "batch_unlabeled": 2},
        "eval": {"every": 4},
        "run": {"log_every": 2, "checkpoint_every": 3, "tensorboard": False},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return resolve({"method": method, "split": "1_4", "out": str(out), **values}, OPTIONS)


def train(config: Config) -> checkpoint.Progress:
    """Runs it in this process."""
    return trainer.train(config, PlainRuntime(str(config.out)))


def records(out: Path) -> list[dict[str, Any]]:
    """What it has noted."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Exploding(SupOnly):
    """Not finite at step 2."""

    bad = 2

    def forward(self, batch: Batch, step: Step) -> Losses:
        losses = super().forward(batch, step)
        worse = float("nan") if step.index == self.bad else 1.0
        return Losses({name: value * worse for name, value in losses.terms.items()}, losses.logs)
