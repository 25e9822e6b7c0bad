import pytest
import torch
from torch.nn import functional as F

from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models import build_model, upsample
from pipeline.models.dpt import DPTDecoder, Fusion, widths
from pipeline.models.parts import FeatureMaps
from pipeline.models.vit import SIZES, ViT


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _decoder(*, features: bool) -> DPTDecoder:
    config = ModelConfig(backbone="vit_tiny", weights="none", feature_dim=8)
    return DPTDecoder(config, ViT(SIZES["vit_tiny"]), 5, features=features, aux=True).eval()


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        (384, ([48, 96, 192, 384], 64)),
        (768, ([96, 192, 384, 768], 128)),
        (1024, ([256, 512, 1024, 1024], 256)),
    ],
)
def test_widths_are_those_of_the_unimatch_v2_release(dim, expected):
    assert widths(dim) == expected


def test_its_size_is_that_of_the_release():
    """UniMatch V2, table of the number of parameters: 97.5 million in all with DINOv2-B, 24.8 with S."""
    for name, total in (("dinov2_vitb14", 97.5e6), ("dinov2_vits14", 24.8e6)):
        with torch.device("meta"):
            model = build_model(ModelConfig(backbone=name, weights="none"), 21, features=False)
        assert sum(each.numel() for each in model.parameters()) == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("features", [False, True])
def test_fused_is_the_papers_pyramid(features):
    """Step by step, with the layers' own weights."""
    decoder = _decoder(features=features)
    maps = [torch.randn(2, 96, 3, 4) for _ in range(4)]
    with torch.no_grad():
        found = decoder.fused(FeatureMaps(maps[0], maps[2], maps[3], maps[1]))
        pyramid = [project(each) for project, each in zip(decoder.projections, maps, strict=True)]
        sizes = [(12, 16), (6, 8), (3, 4), (2, 2)]
        pyramid = [resize(each) for resize, each in zip(decoder.resizes, pyramid, strict=True)]
        assert [tuple(each.shape[2:]) for each in pyramid] == sizes
        weights = [layer.get_parameter("weight") for layer in decoder.reduced]
        pyramid = [F.conv2d(each, weight, padding=1) for weight, each in zip(weights, pyramid, strict=True)]
        x = torch.zeros(())
        last = (12, 16) if features else (24, 32)
        for index, fusion in zip((3, 2, 1, 0), decoder.fusions, strict=True):
            assert isinstance(fusion, Fusion)
            x = pyramid[index] if fusion.own is None else x + _residual(fusion.own, pyramid[index])
            x = upsample(_residual(fusion.both, x), (*sizes, last)[index - 1])
            x = F.conv2d(x, fusion.out.weight, fusion.out.bias)
    torch.testing.assert_close(found, x)
    assert decoder.stride == (2 if features else 1)


def _residual(unit, x):
    inner = F.conv2d(F.relu(x), unit.conv1.weight, unit.conv1.bias, padding=1)
    return x + F.conv2d(F.relu(inner), unit.conv2.weight, unit.conv2.bias, padding=1)


def test_it_has_no_batch_norm_and_no_dropout():
    kinds = {type(each).__name__ for each in _decoder(features=True).modules()}
    assert not any("BatchNorm" in kind or "Dropout" in kind for kind in kinds)


def test_an_encoder_with_other_maps_is_refused():
    config = ModelConfig(backbone="resnet18", decoder="dpt", weights="none")
    with pytest.raises(UserError, match=r"decoder dpt: takes a plain vision transformer, and .* resnet18 is none"):
        build_model(config, 5, features=False)
