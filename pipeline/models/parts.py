"""What encoders, decoders and the network share: the tensors between them and the smallest blocks."""

from typing import NamedTuple

from torch import Tensor, nn


class Taps(NamedTuple):
    """What an encoder hands to a decoder: float feature maps, finest first."""

    low: Tensor
    """[B,c,h,w] at the stride of the logits: 4, tiny 2."""
    mid: Tensor
    """[B,c,h',w'], input of the auxiliary head: the stage before the last."""
    high: Tensor
    """[B,c,h'',w''] at the output stride."""


class Channels(NamedTuple):
    """Channel counts of `Taps`."""

    low: int
    mid: int
    high: int


class Prediction(NamedTuple):
    """What the network says about a batch, at low resolution: stride 4, tiny stride 2."""

    logits: Tensor
    """[B,C,h,w] float class scores."""
    features: Tensor | None
    """[B,D,h,w] float output of the representation head, not normalised; None if built without."""
    aux: Tensor | None
    """[B,C,h',w'] float class scores of the auxiliary head; None if built without."""


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the size (up to the stride), batch norm, ReLU.

    The convolution has no bias: the batch norm subtracts it again.
    """
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
