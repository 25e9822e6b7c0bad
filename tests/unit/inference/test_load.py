"""A method back from its checkpoint; that it is the same one is compared in the tests of the whole system."""

from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from pipeline.checkpoint import Progress
from pipeline.config.cli import resolve
from pipeline.config.schema import without_weights
from pipeline.errors import UserError
from pipeline.inference.load import restore
from pipeline.methods import OPTIONS, build_method


def _saved(folder: Path, *, lost: str = "") -> str:
    values = {"method": "suponly", "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8}}
    config = resolve(values, OPTIONS)
    state = {name: value for name, value in build_method(config, 3).state_dict().items() if name != lost}
    folder.mkdir()
    data = {"index": "i", "split": "s", "classes": ["a", "b", "c"]}
    checkpoint.save(folder, config, data, {}, Progress(1), method=state, optimizer={})
    return str(folder)


def test_a_method_comes_back(tmp_path):
    config, method = restore(_saved(tmp_path / "c"), torch.device("cpu"))
    assert (config.method, method.num_classes, method.training) == ("suponly", 3, False)


def test_networks_of_another_version_are_refused_in_one_line(tmp_path):
    _, method = restore(_saved(tmp_path / "whole"), torch.device("cpu"))
    place = _saved(tmp_path / "c", lost=next(iter(method.state_dict())))
    with pytest.raises(UserError, match=r"/c: made by another version, whose suponly has other networks$"):
        restore(place, torch.device("cpu"))


def test_a_method_whose_statistics_were_frozen_comes_back(tmp_path):
    """Its own weights are all in the checkpoint, and `none` names no statistics."""
    values = {
        "method": "cutmix_seg",
        "model": {"backbone": "tiny", "weights": "runs/other", "feature_dim": 8},
        "cutmix_seg": {"batch_norm": "frozen"},
    }
    config = resolve(values, OPTIONS)
    state = build_method(without_weights(config), 2).state_dict()
    data = {"index": "i", "split": "s", "classes": ["a", "b"]}
    checkpoint.save(tmp_path, config, data, {}, Progress(1), method=state, optimizer={})
    assert restore(str(tmp_path), torch.device("cpu"))[1].batch_norm == "frozen"
