"""torchvision's classification networks as encoders, cut into three stages and dilated to stride 8 or 16.

torchvision is imported when one is built: it takes over a second, which other encoders do without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.config.schema import ModelConfig
from pipeline.models.parts import Levels, StagedEncoder
from pipeline.models.weights import download, load_weights

Stages = tuple[nn.Sequential, nn.Sequential, nn.Sequential]


@dataclass(frozen=True)
class Backbone:
    """How an encoder is made of one torchvision network."""

    unused: tuple[str, ...]
    """Prefixes of the parameters that segmentation does not need."""
    stages: Callable[[Any], Stages]
    """Cuts the network into three parts: up to stride 4, up to the stage before the last, and the last stage."""
    channels: Levels
    """Channels of the outputs of these parts."""


def build(config: ModelConfig) -> StagedEncoder:
    """The encoder that `config` names, with its weights; its maps are at stride 4, and twice at the output stride.

    Raises:
        UserError: the weights cannot be had or do not fit.
    """
    import torchvision

    backbone, stride = BACKBONES[config.backbone], config.output_stride
    network: nn.Module = torchvision.models.get_model(config.backbone)
    digest = load_weights(network, config.backbone, config.weights, backbone.unused, {"torchvision": download})
    encoder = StagedEncoder(backbone.channels, Levels(low=4, mid=stride, high=stride), backbone.stages(network))
    dilate(encoder, stride)
    encoder.weights_digest = digest
    return encoder


def dilate(encoder: nn.Module, output_stride: int) -> None:
    """Replaces every stride beyond `output_stride` by dilation of all later convolutions ("a trous"), in place.

    At every cell of the strided network the result is the same. The layers must be registered in the order in which
    they run. A 1x1 convolution with a stride must be the shortcut beside a strided one that comes before it.
    """
    stride, dilation = 1, 1
    for layer in encoder.modules():
        if isinstance(layer, nn.MaxPool2d):
            stride *= 2
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            layer.stride = (1, 1) if dilation > 1 else layer.stride
        elif isinstance(layer, nn.Conv2d):
            reach = dilation * (layer.kernel_size[0] // 2)
            layer.dilation, layer.padding = (dilation, dilation), (reach, reach)
            if layer.stride == (2, 2) and stride == output_stride:
                layer.stride = (1, 1)
                dilation *= 2
            elif layer.stride == (2, 2):
                stride *= 2


def _resnet_stages(net: Any) -> Stages:
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return nn.Sequential(stem, net.layer1), nn.Sequential(net.layer2, net.layer3), net.layer4


def _mobilenet_stages(net: Any) -> Stages:
    return net.features[:4], net.features[4:14], net.features[14:18]


def _resnet(channels: Levels) -> Backbone:
    return Backbone(("fc.",), _resnet_stages, channels)


_BASIC, _BOTTLENECK = Levels(64, 256, 512), Levels(256, 1024, 2048)
BACKBONES = {
    # features.18 widens 320 channels to 1280 for the classifier
    "mobilenet_v2": Backbone(("classifier.", "features.18."), _mobilenet_stages, Levels(24, 96, 320)),
    "resnet18": _resnet(_BASIC),
    "resnet34": _resnet(_BASIC),
    "resnet50": _resnet(_BOTTLENECK),
    "resnet101": _resnet(_BOTTLENECK),
}
"""The torchvision networks, by torchvision's name."""
