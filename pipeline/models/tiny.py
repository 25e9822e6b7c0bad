"""A network of about .3 M parameters for CPUs and 64x64 images; it learns from scratch in a minute.

24, 48 and 96 channels at strides 2, 4 and 8, dilated at the end, with skip connections; no dropout.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.parts import Channels, FeatureMaps, Prediction, conv_bn_relu
from pipeline.ops.grid import upsample

TINY_CHANNELS = Channels(low=24, mid=48, high=96)


class ResidualBlock(nn.Module):
    """3x3 convolution around a shortcut: relu(x + bn(conv(x))), [B,c,h,w] to the same."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Adds what the convolution sees."""
        return F.relu(x + self.bn(self.conv(x)))


class TinyEncoder(nn.Module):
    """[B,3,H,W] normalised image to `FeatureMaps` at strides 2, 4 and 8."""

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
        # a layer of its own: else the contrast would pull at the very features that classify
        hidden = conv_bn_relu(low, low, 1)
        self.representation = nn.Sequential(hidden, nn.Conv2d(low, feature_dim, 1)) if feature_dim else None
        self.auxiliary = nn.Conv2d(mid, num_classes, 1) if aux else None

    def forward(self, taps: FeatureMaps) -> Prediction:
        """Scores and features at the resolution of `taps.low`."""
        x = self.mid(_resized(self.high(taps.high), taps.mid) + taps.mid)
        x = self.low(_resized(x, taps.low) + taps.low)
        features = None if self.representation is None else self.representation(x)
        aux = None if self.auxiliary is None else self.auxiliary(taps.mid)
        return Prediction(self.classifier(x), features, aux)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the height and width of `like`."""
    return upsample(x, (like.shape[2], like.shape[3]))
