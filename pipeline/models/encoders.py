"""Encoders: torchvision's classification networks, cut into three stages and dilated to stride 8 or 16.

torchvision is imported when one is built: it takes over a second, which `--help` and the tiny network do without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.models.parts import Channels, FeatureMaps
from pipeline.models.weights import load_weights

Stages = tuple[nn.Sequential, nn.Sequential, nn.Sequential]


@dataclass(frozen=True)
class Backbone:
    """How an encoder is made of one torchvision network."""

    unused: tuple[str, ...]
    """Prefixes of the parameters that segmentation does not need."""
    stages: Callable[[Any], Stages]
    """Cuts the network into three parts: up to stride 4, up to the stage before the last, and the last stage."""
    channels: Channels
    """Channels of the outputs of these parts."""


class Encoder(nn.Module):
    """Normalised float image [B,3,H,W] to `FeatureMaps` at stride 4, of the stage before the last, and of the last."""

    def __init__(self, low: nn.Module, mid: nn.Module, high: nn.Module) -> None:
        super().__init__()
        self.low = low
        self.mid = mid
        self.high = high

    def forward(self, x: Tensor) -> FeatureMaps:
        """Runs the three stages."""
        low = self.low(x)
        mid = self.mid(low)
        return FeatureMaps(low, mid, self.high(mid))


def build_encoder(config: ModelConfig) -> tuple[Encoder, Channels]:
    """The encoder that `config` names, with its weights.

    Raises:
        UserError: the weights cannot be had or do not fit.
    """
    import torchvision

    backbone = BACKBONES[config.backbone]
    network: nn.Module = torchvision.models.get_model(config.backbone)
    load_weights(network, config.backbone, config.weights, backbone.unused)
    encoder = Encoder(*backbone.stages(network))
    dilate(encoder, config.output_stride)
    return encoder, backbone.channels


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


def _resnet(channels: Channels) -> Backbone:
    return Backbone(("fc.",), _resnet_stages, channels)


_BASIC, _BOTTLENECK = Channels(64, 256, 512), Channels(256, 1024, 2048)
BACKBONES = {
    # features.18 widens 320 channels to 1280 for the classifier
    "mobilenet_v2": Backbone(("classifier.", "features.18."), _mobilenet_stages, Channels(24, 96, 320)),
    "resnet18": _resnet(_BASIC),
    "resnet34": _resnet(_BASIC),
    "resnet50": _resnet(_BOTTLENECK),
    "resnet101": _resnet(_BOTTLENECK),
}
"""The torchvision networks, by torchvision's name."""
