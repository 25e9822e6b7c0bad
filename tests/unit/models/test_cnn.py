import copy

import pytest
import torch
import torchvision
from torch import nn

from pipeline.models.cnn import BACKBONES, dilate
from pipeline.models.parts import Levels, StagedEncoder


def _cut(name: str) -> StagedEncoder:
    backbone = BACKBONES[name]
    return StagedEncoder(backbone.channels, Levels(4, 16, 32), backbone.stages(torchvision.models.get_model(name)))


def _strided(name: str) -> StagedEncoder:
    torch.manual_seed(0)
    encoder = _cut(name).eval()
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
    with torch.device("meta"):
        encoder = _cut(name)
        maps = encoder(torch.zeros(1, 3, 64, 64))
    assert [one.shape[1] for one in maps.levels] == encoder.channels.all
    assert [one.shape[2] for one in maps.levels] == [64 // stride for stride in encoder.strides.all]
