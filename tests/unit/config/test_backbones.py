from pkgutil import resolve_name

import pytest

from pipeline.config.backbones import BACKBONES, DECODERS, check_crop, find_backbone, find_decoder
from pipeline.config.cli import resolve
from pipeline.errors import UserError
from pipeline.methods import OPTIONS


@pytest.mark.parametrize("place", sorted({*(each.build for each in BACKBONES.values()), *DECODERS.values()}))
def test_what_is_listed_is_there(place):
    assert callable(resolve_name(place))


def test_each_backbone_has_a_decoder():
    assert {find_decoder("auto", name) for name in [*BACKBONES, "timm/any"]} == {"tiny", "deeplab", "dpt"}
    assert find_decoder("segformer", "resnet18") == "segformer"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"backbone": "dinov2_vitb"}, "model.backbone: 'dinov2_vitb' is not known; did you mean dinov2_vitb14?"),
        ({"decoder": "segfomer"}, "model.decoder: 'segfomer' is not known; did you mean segformer?"),
    ],
)
def test_other_names_are_refused_before_torch_is_needed(model, words):
    with pytest.raises(UserError) as error:
        resolve({"model": model}, OPTIONS)
    assert str(error.value) == words


def test_crops_that_patches_do_not_fit_are_refused():
    check_crop((518, 28), "dinov2_vitb14")
    check_crop((513, 97), "resnet50")
    with pytest.raises(UserError) as error:
        check_crop((513, 5), "dinov2_vitb14")
    assert str(error.value) == (
        "data.crop 513,5: model.backbone dinov2_vitb14 takes multiples of 14; pass --data.crop 518,14"
    )
    assert find_backbone("vit_tiny").multiple == 8
