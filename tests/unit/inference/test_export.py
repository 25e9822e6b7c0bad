"""Exports of a run of a few steps, and what reads them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import commands
from pipeline.commands import networks
from pipeline.config.cli import resolve
from pipeline.errors import RunError, UserError
from pipeline.inference import export as exports
from pipeline.inference.export import FORMATS, export
from pipeline.inference.load import Model, load_model
from pipeline.methods import OPTIONS
from pipeline.training.runtime import PlainRuntime
from pipeline.training.trainer import train

LOAD = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
image = torch.load(sys.argv[2])
torch.save(program(image), sys.argv[3])
assert "pipeline" not in sys.modules
"""


@pytest.fixture(scope="module")
def run(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher and a student, of which the teacher is the result."""
    out = str(tmp_path_factory.mktemp("export") / "run")
    values = {
        "method": "mean_teacher",
        "split": "1_4",
        "out": out,
        "data": {"root": shapes, "crop": [32, 32]},
        "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8},
        "optim": {"steps": 3, "batch_labeled": 2, "batch_unlabeled": 2},
        "run": {"tensorboard": False},
    }
    train(resolve(values, OPTIONS), PlainRuntime(out))
    return out


@pytest.fixture(scope="module")
def model(run: str) -> Model:
    return load_model(run)


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (75, 118, 3), np.uint8)


def test_a_program_needs_torch_alone(run, model, photo, tmp_path):
    said = export(run, str(tmp_path / "out"), "torch_export")
    assert said.startswith(f"{tmp_path}/out/model.pt2: the classes of PyTorch on images (1 of 64x64, 2 of 97x131")
    image = torch.from_numpy(photo).permute(2, 0, 1).unsqueeze(0).contiguous()
    torch.save(image, tmp_path / "image")
    arguments = [sys.executable, "-c", LOAD, *(str(tmp_path / name) for name in ("out/model.pt2", "image", "logits"))]
    subprocess.run(arguments, check=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
    assert torch.equal(torch.load(tmp_path / "logits")[0], model.logits(photo))


def test_a_program_of_a_transformer_takes_any_size(shapes, tmp_path):
    """`export` compares it with PyTorch at sizes that are no multiples of a patch."""
    out = str(tmp_path / "run")
    values = {
        "method": "suponly",
        "split": "1_4",
        "out": out,
        "data": {"root": shapes, "crop": [32, 32]},
        "model": {"backbone": "vit_tiny", "weights": "none"},
        "optim": {"steps": 1, "batch_labeled": 2},
        "run": {"tensorboard": False, "pictures": 0},
    }
    train(resolve(values, OPTIONS), PlainRuntime(out))
    assert "2 of 97x131, 1 of 200x121), logits within" in export(out, str(tmp_path / "out"), "torch_export")
    assert "| network | vit_tiny with dpt, scale 1 |" in (tmp_path / "out" / "README.md").read_text()


def test_a_program_of_classes(run, model, photo, tmp_path):
    export(run, str(tmp_path), "torch_export", classes=True)
    program = torch.export.load(tmp_path / "model.pt2").module()
    image = torch.from_numpy(photo).permute(2, 0, 1).unsqueeze(0).contiguous()
    found = program(image)
    assert found.dtype == torch.uint8
    assert np.array_equal(found[0].numpy(), model.predict(photo))


def test_onnx_in_its_runtime(run, model, photo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export(run, str(tmp_path), "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(["logits"], {"image": photo.transpose(2, 0, 1)[None].copy()})
    assert np.allclose(logits[0], model.logits(photo).numpy(), atol=1e-3)


@pytest.mark.parametrize("half", [False, True])
def test_weights_are_a_model_again(run, model, photo, tmp_path, half):
    said = export(run, str(tmp_path), "safetensors", half=half)
    assert said.endswith("tensors read back, all equal")
    again = load_model(str(tmp_path))
    assert (again.classes, again.palette) == (model.classes, model.palette)
    if half:
        assert np.mean(again.predict(photo) == model.predict(photo)) > 0.9
    else:
        assert torch.equal(again.logits(photo), model.logits(photo))


def test_the_command_knows_every_format():
    assert tuple(FORMATS) == networks.EXPORT_FORMATS


def test_what_lies_beside_it(run, tmp_path, capsys):
    commands.export([run, "--out", str(tmp_path), "--format", "safetensors"])
    assert f"{tmp_path}/model.safetensors: " in capsys.readouterr().out
    assert json.loads((tmp_path / "classes.json").read_text())["classes"][:2] == ["background", "disk"]
    card = (tmp_path / "README.md").read_text()
    for words in ("0 background, 1 disk", "mean_teacher, 3 of 3 steps", "100 labeled and 300 unlabeled", "val mIoU"):
        assert words in card


def test_options_that_do_not_fit(run, tmp_path):
    with pytest.raises(UserError, match="--classes: safetensors holds weights"):
        export(run, str(tmp_path), "safetensors", classes=True)
    with pytest.raises(UserError, match="--half: programs that run ONNX"):
        export(run, str(tmp_path), "onnx", half=True)
    with pytest.raises(UserError, match="no checkpoint there"):
        export(str(tmp_path / "nothing"), str(tmp_path), "torch_export")
    assert list(tmp_path.iterdir()) == []


def test_a_program_with_other_results_is_not_written(run, tmp_path, monkeypatch):
    write = exports._WRITERS["torch_export"]

    def spoilt(program, file):
        right = write(program, file)
        return lambda image: right(image) + 1

    monkeypatch.setitem(exports._WRITERS, "torch_export", spoilt)
    with pytest.raises(RunError, match="gives other results than PyTorch"):
        export(run, str(tmp_path), "torch_export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["cut", "other weights", "no text"])
def test_damaged_weights_are_one_line(run, tmp_path, what):
    export(run, str(tmp_path), "safetensors")
    file = Path(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    if what == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif what == "no text":
        file.write_bytes(b"<html>" * 100)
    else:
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged, or no export of this version"):
        load_model(str(tmp_path))
