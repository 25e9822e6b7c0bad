"""The example of `docs/adding-a-method.md`, as a reader would use it."""

import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.config import options
from pipeline.config.cli import field_docs, resolve
from pipeline.methods import METHODS, OPTIONS, Method
from pipeline.training import trainer
from pipeline.training.runtime import PlainRuntime
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "adding-a-method.md").read_text()
OWN_OPTIONS, METHOD = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
NAME = "min_entropy"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Method]]:
    """The first blocks of code on the page, each imported from a file and registered."""

    def imported(name: str, text: str) -> ModuleType:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    own = imported("own_options", inspect.getsource(options).partition("@dataclass")[0] + OWN_OPTIONS).EntropyOptions
    monkeypatch.setattr(options, "EntropyOptions", own, raising=False)
    monkeypatch.setitem(OPTIONS, NAME, {NAME: own})
    kind = imported(NAME, METHOD).MinEntropy
    monkeypatch.setitem(METHODS, NAME, kind)
    return kind


def test_the_example_is_short_and_documented(example):
    assert sum(bool(line.strip()) for line in (OWN_OPTIONS + METHOD).splitlines()) <= 52
    assert field_docs(OPTIONS[NAME][NAME]) == {
        "lambda_u": "Weight of the entropy.",
        "batch_norm": "Whether labeled and unlabeled images share batch statistics.",
    }


def test_the_example_trains(example, shapes, tmp_path):
    config = resolve(
        {
            "method": NAME,
            "split": "1_4",
            "out": str(tmp_path / "run"),
            "data": {"root": shapes, "crop": [48, 48], "scale": [0.85, 1.2]},
            "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8},
            "optim": {"lr": 0.02, "head_lr_mult": 1, "steps": 12, "batch_labeled": 4, "batch_unlabeled": 4},
            "eval": {"every": 1000},
            "run": {"log_every": 1, "checkpoint_every": 1000, "tensorboard": False},
            NAME: {"lambda_u": 0.2},
        },
        OPTIONS,
    )
    assert trainer.train(config, PlainRuntime(str(config.out))).step == 12
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1]["supervised"] < losses[0]["supervised"]
    assert 0 < losses[-1]["entropy"] < losses[0]["entropy"]
