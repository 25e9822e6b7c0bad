"""A network of about 0.3 million parameters for CPUs and 64x64 images; it trains from scratch in a minute.

It has 24, 48 and 96 channels at strides 2, 4 and 8, dilation in its last stage, skip connections, and no dropout.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.parts import Channels, FeatureMaps, Prediction, conv_bn_relu
from pipeline.ops.grid import upsample

TINY_CHANNELS = Channels(low=24, mid=48, high=96)
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


class TinyEncoder(nn.Module):
    """Normalised float image [B,3,H,W] to `FeatureMaps` at strides 2, 4 and 8."""

    def __init__(self, channels: Channels) -> None:
        super().__init__()
        low, mid, high = channels
        self.low = nn.Sequential(conv_bn_relu(3, low, stride=2), ResidualBlock(low))
        self.mid = nn.Sequential(conv_bn_relu(low, mid, stride=2), ResidualBlock(mid), ResidualBlock(mid))
        self.high = nn.Sequential(conv_bn_relu(mid, high, stride=2), ResidualBlock(high, 2), ResidualBlock(high, 4))

    def forward(self, x: Tensor) -> FeatureMaps:
        """Runs the three stages."""
        low = self.low(x)
        mid = self.mid(low)
        return FeatureMaps(low, mid, self.high(mid))


class TinyDecoder(nn.Module):
    """Back to stride 2, adding the skip connections on the way, then 1x1 heads.

    Args:
        channels: of the encoder.
        num_classes: C.
        feature_dim: D of the representation head; 0: no such head.
        aux: whether to add the auxiliary head, at stride 4.
    """

    def __init__(self, channels: Channels, num_classes: int, feature_dim: int, *, aux: bool) -> None:
        super().__init__()
        low, mid, high = channels
        self.high = conv_bn_relu(high, mid, 1)
        self.mid = conv_bn_relu(mid, low)
        self.low = conv_bn_relu(low, low)
        self.classifier = nn.Conv2d(low, num_classes, 1)
        # with a hidden layer of its own: else the contrast would change the features that the classifier reads
        hidden = conv_bn_relu(low, low, 1)
        self.representation = nn.Sequential(hidden, nn.Conv2d(low, feature_dim, 1)) if feature_dim else None
        self.auxiliary = nn.Conv2d(mid, num_classes, 1) if aux else None

    def forward(self, maps: FeatureMaps) -> Prediction:
        """Logits and features at the resolution of `maps.low`."""
        x = self.mid(_resized(self.high(maps.high), maps.mid) + maps.mid)
        x = self.low(_resized(x, maps.low) + maps.low)
        features = None if self.representation is None else self.representation(x)
        aux = None if self.auxiliary is None else self.auxiliary(maps.mid)
        return Prediction(self.classifier(x), features, aux)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the height and width of `like`."""
    return upsample(x, (like.shape[2], like.shape[3]))
