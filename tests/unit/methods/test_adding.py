"""The example of `docs/adding-a-method.md`, as a reader would use it."""

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.config import options
from pipeline.config.cli import field_docs, resolve
from pipeline.config.methods import OPTIONS, SPECS, MethodSpec
from pipeline.methods import METHODS, Method
from pipeline.training import trainer
from pipeline.training.runtime import PlainRuntime
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "adding-a-method.md").read_text()
OWN_OPTIONS, METHOD, _, SPEC = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(ENTRY_POINT,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
NAME = "min_entropy"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Method]:
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
    imported(NAME, METHOD)
    monkeypatch.setitem(SPECS, NAME, MethodSpec(f"{NAME}:MinEntropy", {NAME: own}))
    monkeypatch.setitem(OPTIONS, NAME, {NAME: own})
    return METHODS[NAME]


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


def installed(folder: Path, spec: str, method: str = "", entry: str = ENTRY_POINT) -> dict[str, str]:
    """A package `min_entropy` as an installer leaves it; the environment in which it is found."""
    package, facts = folder / NAME, folder / f"{NAME}-1.0.dist-info"
    for each in (package, facts):
        each.mkdir()
    (package / "__init__.py").touch()
    (package / "spec.py").write_text(spec)
    (package / "method.py").write_text(method)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        re.sub(r'\[project\.entry-points\."(.*)"\]', r"[\1]", entry).replace('"', "")
    )
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


OWN_SPEC = inspect.getsource(options).partition("@dataclass")[0] + OWN_OPTIONS + SPEC
TRAINED = """
from pipeline import make_config
from pipeline.training import trainer
from pipeline.training.runtime import PlainRuntime
config = make_config({"method": "min_entropy", "data.root": ROOT, "out": OUT, "optim.steps": 2}, preset="demo")
print("ended at", trainer.train(config, PlainRuntime(OUT)).step)
"""


def test_another_package_brings_it(shapes, tmp_path):
    environment = installed(tmp_path, OWN_SPEC, METHOD.replace("pipeline.config.options", f"{NAME}.spec"))
    words = ["train", "--method", NAME, "--min_entropy.lambda_u", "0.3", "--print_config"]
    shown = subprocess.run(
        [sys.executable, "-m", "pipeline", *words], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert "lambda_u: 0.3" in shown.stdout, shown.stderr
    code = f"ROOT, OUT = {shapes!r}, {str(tmp_path / 'run')!r}\n{TRAINED}"
    trained = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert "ended at 2" in trained.stdout, trained.stderr


@pytest.mark.parametrize(
    ("spec", "entry", "said"),
    [
        ("import nothing_of_this_name", ENTRY_POINT, "No module named 'nothing_of_this_name'; mend or uninstall it"),
        ("SPEC = 3", ENTRY_POINT, "min_entropy.spec:SPEC is no MethodSpec"),
        (OWN_SPEC, ENTRY_POINT.replace("min_entropy =", "u2pl ="), "there is one of this name; rename it"),
    ],
    ids=["broken", "something else", "a name that is taken"],
)
def test_a_package_that_brings_none_is_told_in_one_line(tmp_path, spec, entry, said):
    environment = installed(tmp_path, spec, entry=entry)
    command = [sys.executable, "-m", "pipeline", "train", "--split", "1_2"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith(f"{said}\n")
    assert f"of the package {NAME}: " in done.stderr
    assert "Traceback" not in done.stderr
