"""A network of about 0.3 million parameters for CPUs and 64x64 images; it trains from scratch in a minute.

It has 24, 48 and 96 channels at strides 2, 4 and 8, dilation in its last stage, skip connections, and no dropout.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models.parts import Decoder, Encoder, FeatureMaps, Levels, StagedEncoder, conv_bn_relu
from pipeline.ops.grid import upsample

CHANNELS = Levels(low=24, mid=48, high=96)
"""Channels of its feature maps."""


class ResidualBlock(nn.Module):
    """3x3 convolution with a shortcut: relu(x + bn(conv(x))), float [B,c,h,w] to the same shape."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Adds the convolution of `x` to `x`."""
        return F.relu(x + self.bn(self.conv(x)))


class TinyEncoder(StagedEncoder):
    """`FeatureMaps` at strides 2, 4 and 8."""

    def __init__(self) -> None:
        low, mid, high = CHANNELS.all
        stages = (
            nn.Sequential(conv_bn_relu(3, low, stride=2), ResidualBlock(low)),
            nn.Sequential(conv_bn_relu(low, mid, stride=2), ResidualBlock(mid), ResidualBlock(mid)),
            nn.Sequential(conv_bn_relu(mid, high, stride=2), ResidualBlock(high, 2), ResidualBlock(high, 4)),
        )
        super().__init__(CHANNELS, Levels(low=2, mid=4, high=8), stages)


def build(config: ModelConfig) -> TinyEncoder:
    """The encoder, from scratch; torch's generator stays where it is, see `TinyDecoder`.

    Raises:
        UserError: the config asks for weights.
    """
    if config.weights != "none":
        raise UserError(f"model.weights {config.weights}: tiny has no pretrained weights; use none or another backbone")
    with torch.random.fork_rng(devices=[]):
        return TinyEncoder()


class TinyDecoder(Decoder):
    """Back to the encoder's finest stride, adding the skip connections on the way, then 1x1 heads.

    The tiny encoder's weights are drawn anew after the decoder's: in that order all runs with both began.

    Args:
        config: feature_dim.
        encoder: gives the channels.
        num_classes: C.
        features: whether to add the representation head.
        aux: whether to add the auxiliary head, at the resolution of `FeatureMaps.mid`.
    """

    def __init__(self, config: ModelConfig, encoder: Encoder, num_classes: int, *, features: bool, aux: bool) -> None:
        super().__init__()
        self.stride = encoder.strides.low
        low, mid, high = encoder.channels.low, encoder.channels.mid, encoder.channels.high
        self.high = conv_bn_relu(high, mid, 1)
        self.mid = conv_bn_relu(mid, low)
        self.low = conv_bn_relu(low, low)
        self.classifier = nn.Conv2d(low, num_classes, 1)
        # with a hidden layer of its own: else the contrast would change the features that the classifier reads
        hidden = conv_bn_relu(low, low, 1)
        self.representation = nn.Sequential(hidden, nn.Conv2d(low, config.feature_dim, 1)) if features else None
        self.auxiliary = nn.Conv2d(mid, num_classes, 1) if aux else None
        for layer in encoder.modules() if isinstance(encoder, TinyEncoder) else ():
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                layer.reset_parameters()

    def fused(self, maps: FeatureMaps) -> Tensor:
        """[B,c,h,w] at the resolution of `maps.low`."""
        x = self.mid(_resized(self.high(maps.high), maps.mid) + maps.mid)
        return self.low(_resized(x, maps.low) + maps.low)  # type: ignore[no-any-return]


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the height and width of `like`."""
    return upsample(x, (like.shape[2], like.shape[3]))
