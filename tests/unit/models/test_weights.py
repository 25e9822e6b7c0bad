import hashlib
import io
import logging
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision

from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models import build_model
from pipeline.models.weights import download, load_weights, read_state

UNUSED = ("fc.",)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return torchvision.models.resnet18().state_dict()


def _save(state: object, path: Path) -> str:
    torch.save(state, path)
    return str(path)


def _load(source: str) -> torchvision.models.ResNet:
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    load_weights(network, "resnet18", source, UNUSED, {"torchvision": download})
    return network


def test_a_file_fills_the_encoder(state, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        network = _load(_save(state, tmp_path / "r.pth"))
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[key]) != key.startswith("fc."), key
    assert f"resnet18: {len(state) - 2} tensors from {tmp_path / 'r.pth'}" in caplog.text


def test_the_classifier_does_not_matter(state, tmp_path):
    state["fc.weight"] = torch.zeros(7, 3)
    del state["fc.bias"]
    _load(_save(state, tmp_path / "r.pth"))


def test_files_without_batch_counts_load(state, tmp_path):
    _load(_save({key: t for key, t in state.items() if "num_batches" not in key}, tmp_path / "r.pth"))


def test_a_missing_key_is_named(state, tmp_path):
    del state["layer2.0.conv1.weight"]
    with pytest.raises(UserError, match=r"r\.pth: layer2\.0\.conv1\.weight is missing.*of resnet18\?"):
        _load(_save(state, tmp_path / "r.pth"))


def test_an_unexpected_key_is_named(state, tmp_path):
    state["layer9.weight"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"r\.pth: layer9\.weight is unexpected"):
        _load(_save(state, tmp_path / "r.pth"))


def test_a_wrong_shape_is_named(state, tmp_path):
    state["conv1.weight"] = torch.zeros(64, 4, 7, 7)
    with pytest.raises(UserError, match=r"conv1\.weight has shape \[64, 4, 7, 7\], expected \[64, 3, 7, 7\]"):
        _load(_save(state, tmp_path / "r.pth"))


def test_the_hash_in_the_name_is_checked(state, tmp_path):
    data = io.BytesIO()
    torch.save(state, data)
    good = hashlib.sha256(data.getvalue()).hexdigest()[:8]
    (tmp_path / f"r-{good}.pth").write_bytes(data.getvalue())
    _load(str(tmp_path / f"r-{good}.pth"))
    bad = "0" * 8
    (tmp_path / f"r-{bad}.pth").write_bytes(data.getvalue())
    with pytest.raises(UserError, match=f"r-{bad}.pth: damaged"):
        _load(str(tmp_path / f"r-{bad}.pth"))


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x04garbage"])
def test_no_state_dict(content, tmp_path):
    (tmp_path / "r.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.pth: not a file of weights"):
        read_state(str(tmp_path / "r.pth"))


def test_code_in_a_file_is_not_run(tmp_path):
    with pytest.raises(UserError, match="not a file of weights"):
        read_state(_save({"conv1.weight": Trap()}, tmp_path / "r.pth"))


def test_a_checkpoint_is_no_state_dict(state, tmp_path):
    with pytest.raises(UserError, match="holds no plain state dict"):
        read_state(_save({"model": state, "epoch": 3}, tmp_path / "r.pth"))


def test_values_that_are_not_finite(state, tmp_path):
    state["conv1.weight"][0] = torch.nan
    with pytest.raises(UserError, match=r"r\.pth: conv1\.weight holds values that are not finite; take other weights"):
        _load(_save(state, tmp_path / "r.pth"))


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="not found"):
        _load(str(tmp_path / "none.pth"))


def test_a_failed_download_says_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(
        UserError, match=r"cannot download https://.*resnet18-.*\.pth .*pass its path as model\.weights"
    ):
        _load("torchvision")


def test_torchvision_weights_are_loaded(monkeypatch, state):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    assert torch.equal(_load("torchvision").conv1.weight, state["conv1.weight"])


def test_a_file_of_another_family_fills_its_own_encoder_only(tmp_path, caplog):
    torch.manual_seed(1)
    file = _save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "mobilenet.pth")
    with caplog.at_level(logging.INFO):
        config = ModelConfig(backbone="mobilenet_v2", weights=file, width=16, feature_dim=8)
        model = build_model(config, 5, features=False)
    stored = torch.load(file, weights_only=True)
    kept = [tensor for key, tensor in stored.items() if not key.startswith(("classifier.", "features.18."))]
    loaded = list(model.encoder.state_dict().values())
    assert len(loaded) == len(kept)
    assert all(torch.equal(a, b) for a, b in zip(loaded, kept, strict=True))
    assert f"mobilenet_v2: {len(kept)} tensors" in caplog.text
    with pytest.raises(UserError, match=r"conv1\.weight is missing; is this a state dict of resnet18\?"):
        build_model(ModelConfig(backbone="resnet18", weights=file), 5, features=False)
