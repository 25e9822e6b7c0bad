"""The command of a run: as a shell and the command line read it, it gives the same config."""

import shlex
from dataclasses import replace
from typing import Any

import pytest

from pipeline.config.cli import layered, parse_config, parse_values, resolve
from pipeline.config.command import command
from pipeline.config.methods import OPTIONS
from pipeline.config.schema import Config


def config(preset: str | None = None, **values: Any) -> Config:
    return resolve(layered({"out": "/o", "data.root": "/d/shapes", **values}, preset=preset), OPTIONS)


@pytest.mark.parametrize(
    "made",
    [
        config(),
        config("demo", method="cps", split="1_16", seed=3),
        config("voc_classic", split="full", **{"data.root": "s3://bucket/voc it's", "optim.lr": 1e-5}),
        config("cityscapes", method="u2pl_ael", **{"u2pl.lambda_c": 0.5, "run.tensorboard": False}),
        config(
            "demo",
            **{
                "data.unlabeled_pools": ["/a", "/b c"], "data.pool_weights": [0, 1, 2.5],
                "data.pool_generations": [1, 2], "model.weights": "/w.pt", "data.flip": False,
                "u2pl.warmup": 0, "scaling.workers": "2..8",
            },
        ),
    ],
)  # fmt: skip
def test_it_gives_the_same_config_again(made):
    words = shlex.split(command(made, OPTIONS))
    assert words[:2] == ["u2pl", "train"]
    again, _ = parse_config(words[2:], "", OPTIONS)
    assert replace(again, out="/o") == made


def test_the_preset_leaves_few_flags():
    said = command(config("demo", method="cps", split="1_16"), OPTIONS)
    assert said == "u2pl train --preset demo --method cps --split 1_16 --seed 0 --data /d/shapes"


def test_a_student_is_trained_by_its_recipe():
    made = config("demo", method="self_training", **{"data.pseudo_labels": "/o/pseudo_labels"})
    words = shlex.split(command(made, OPTIONS))
    assert words[:2] == ["u2pl", "self_training"]
    values, _ = parse_values(words[2:], "", OPTIONS, None, lambda _: ["self_training"])
    again = resolve(values, OPTIONS)
    assert replace(again, out="/o", data=replace(again.data, pseudo_labels="/o/pseudo_labels")) == made
