import copy

import pytest
import torch
import torchvision
from torch import nn

from pipeline.models.encoders import BACKBONES, Encoder, dilate


def _strided(name: str) -> Encoder:
    torch.manual_seed(0)
    backbone = BACKBONES[name]
    encoder = Encoder(*backbone.stages(torchvision.models.get_model(name))).eval()
    for layer in encoder.modules():  # statistics that keep activations alive through all layers
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            nn.init.normal_(layer.running_mean, std=0.1)
    return encoder


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "resnet50"])
@pytest.mark.parametrize(("output_stride", "size"), [(16, 65), (8, 65), (8, 64), (8, 97)])
def test_dilated_equals_strided_where_that_has_a_cell(name, output_stride, size):
    torch.set_num_threads(1)
    strided = _strided(name)
    dilated = copy.deepcopy(strided)
    dilate(dilated, output_stride)
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        few, many = strided(image), dilated(image)
    factor = 32 // output_stride
    torch.testing.assert_close(many.low, few.low)
    torch.testing.assert_close(many.high[..., ::factor, ::factor], few.high, rtol=1e-3, atol=1e-3)
    assert many.high.shape[-1] == -(-size // output_stride)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "resnet101"])
def test_channels_are_what_the_stages_give(name):
    backbone = BACKBONES[name]
    with torch.device("meta"):
        encoder = Encoder(*backbone.stages(torchvision.models.get_model(name)))
        maps = encoder(torch.zeros(1, 3, 64, 64))
    assert tuple(one.shape[1] for one in maps) == backbone.channels
    assert [one.shape[2] for one in maps] == [16, 4, 2]
