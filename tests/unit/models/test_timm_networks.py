import sys
from typing import Literal

import pytest
import torch

from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models import SegmentationModel, build_model
from pipeline.models.norm import SyncBatchNorm2d, sync_batchnorm
from pipeline.models.timm_networks import TimmEncoder
from pipeline.training.preflight import check_packages

NETWORKS = [("resnet10t", "deeplab", 8), ("resnet10t", "deeplab", 16), ("convnext_atto", "auto", 16)]
HIERARCHIES = [("resnet10t", "segformer", 8), ("pvt_v2_b0", "segformer", 8)]
PLAIN = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _model(name: str, decoder: str = "auto", stride: Literal[8, 16] = 16, weights: str = "none") -> SegmentationModel:
    config = ModelConfig(
        backbone=f"timm/{name}",
        decoder=decoder,
        output_stride=stride,
        weights=weights,
        width=16,
        feature_dim=8,
    )
    return build_model(config, 5, features=True, aux=True)


@pytest.mark.parametrize(("name", "decoder", "stride"), NETWORKS + HIERARCHIES)
def test_its_maps_are_what_it_says_and_all_of_it_learns(name, decoder, stride):
    pytest.importorskip("timm")
    model = _model(name, decoder, stride).train()
    image = torch.randint(0, 256, (2, 3, 96, 64), dtype=torch.uint8)
    maps, encoder = model.encode(image), model.encoder
    assert [each.shape[1] for each in maps.levels] == encoder.channels.all
    assert [96 // each.shape[2] for each in maps.levels] == encoder.strides.all
    assert encoder.strides.high == (32 if decoder == "segformer" else stride)
    sum(part.square().mean() for part in model.decode(maps)).backward()  # type: ignore[union-attr]
    assert [name for name, each in model.named_parameters() if each.grad is None] == []
    assert sorted(id(each) for layer in encoder.layers() for each in layer) == sorted(map(id, encoder.parameters()))
    assert len(encoder.layers()) > 4
    assert model.decode(maps).logits.shape[2:] == (24, 16)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_transformers_go_with_dpt(name):
    """Also DINOv2's with registers, and DINOv3's; images of any size."""
    pytest.importorskip("timm")
    model = _model(name, "dpt").train()
    patch = model.encoder.strides.low
    prediction = model(torch.randint(0, 256, (1, 3, 3 * patch + 5, 2 * patch - 3), dtype=torch.uint8))
    assert prediction.logits.shape[2:] == (12, 8)
    sum(part.square().mean() for part in prediction).backward()  # type: ignore[union-attr]
    assert [name for name, each in model.named_parameters() if each.grad is None] == []
    layers, embeddings = model.encoder.layers(), [model.encoder.get_parameter(one) for one in model.encoder.embeddings]
    assert sorted(id(each) for layer in layers for each in layer) == sorted(map(id, model.encoder.parameters()))
    assert [id(each) for each in layers[0]] == [id(each) for each in embeddings]
    assert len(layers) >= 14


def test_a_file_of_the_whole_network_fills_it(tmp_path):
    timm = pytest.importorskip("timm")
    whole = timm.create_model("resnet10t", num_classes=7)
    torch.save(whole.state_dict(), tmp_path / "r.pth")
    encoder = _model("resnet10t", weights=str(tmp_path / "r.pth")).encoder
    assert isinstance(encoder, TimmEncoder)
    state = whole.state_dict()
    assert all(torch.equal(value, state[key.removeprefix("network.")]) for key, value in encoder.state_dict().items())
    state["layer1.0.conv1.weight"] = torch.zeros(1, 64, 3, 3)
    torch.save(state, tmp_path / "r.pth")
    with pytest.raises(
        UserError, match=r"r\.pth: layer1\.0\.conv1\.weight has shape .*is this a state dict of resnet10t"
    ):
        _model("resnet10t", weights=str(tmp_path / "r.pth"))


@pytest.mark.parametrize("name", ["regnetx_002", "efficientnet_b0"])
def test_batch_norms_with_an_activation_may_be_replaced(name, tmp_path):
    """As the trainer does with several workers: in timm's networks some batch norms are activations, too."""
    timm = pytest.importorskip("timm")
    whole = timm.create_model(name, output_stride=16).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    encoder = sync_batchnorm(_model(name, weights=str(tmp_path / "w.pth")).encoder).eval()
    assert {type(each) for each in encoder.modules() if isinstance(each, torch.nn.BatchNorm2d)} == {SyncBatchNorm2d}
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = whole.forward_intermediates(image, indices=4, intermediates_only=True)
        for one, other in zip(encoder(image).levels, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def fail(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route\nto host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        UserError, match=r"^model\.weights timm: cannot fetch resnet10t \(no route to host\); fetch its"
    ):
        _model("resnet10t", weights="timm")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet5O", "timm has no resnet5O; did you mean resnet50"),
        ("pvt_v2_b0", "cannot be dilated to model.output_stride; pass --model.decoder segformer"),
        ("vit_tiny_patch16_224 segformer", "has no four levels of falling resolution"),
        ("swin_tiny_patch4_window7_224 segformer", "has no four levels of falling resolution for images of any size"),
        ("resnet10t dpt", "is no plain transformer for images of any size; pass --model.decoder auto"),
    ],
)
def test_networks_that_do_not_fit_are_one_line(name, words):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=words):
        _model(*name.split())


def test_without_timm_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("pipeline.training.preflight.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^timm is not installed; pip install 'u2pl-ray\[timm\]'$"):
        _model("resnet10t")
    for backbone, weights in (("timm/resnet10t", "none"), ("dinov2_vits14", "timm")):
        with pytest.raises(UserError, match="timm is not installed"):
            check_packages(backbone, weights)
    check_packages("dinov2_vits14", "none")


def test_a_network_whose_blocks_are_not_known_is_not_recomputed():
    config = ModelConfig(backbone="timm/resnet10t", weights="none", checkpoint_activations=True)
    with pytest.raises(UserError, match=r"the blocks of model.backbone timm/resnet10t are not known here"):
        build_model(config, 3, features=False)
