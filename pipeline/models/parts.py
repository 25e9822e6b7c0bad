"""What encoders, decoders and the network share: the types of the tensors between them, and small building blocks."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn


class FeatureMaps(NamedTuple):
    """What an encoder hands to a decoder: three float feature maps. `low`, `mid` and `high` are levels of the network.

    So `low` has the finest resolution, and `high` the coarsest.
    """

    low: Tensor
    """[B,c,h,w] of an early stage, at the resolution of the logits: stride 4, tiny 2."""
    mid: Tensor
    """[B,c,h',w'] of the stage before the last, input of the auxiliary head: stride 8 or 16, tiny 4."""
    high: Tensor
    """[B,c,h'',w''] of the last stage, at the output stride: 8 or 16, tiny 8."""

    def of(self, images: slice) -> "FeatureMaps":
        """The feature maps of some of the images."""
        return FeatureMaps(*(tensor[images] for tensor in self))


class Channels(NamedTuple):
    """Numbers of channels of the three `FeatureMaps`."""

    low: int
    """Of the map at the resolution of the logits."""
    mid: int
    """Of the map before the last."""
    high: int
    """Of the last map."""


class Prediction(NamedTuple):
    """The network's output for a batch, at low resolution: stride 4, tiny stride 2."""

    logits: Tensor
    """[B,C,h,w] float."""
    features: Tensor | None
    """[B,D,h,w] float output of the representation head, not normalised; None if built without."""
    aux: Tensor | None
    """[B,C,h',w'] float logits of the auxiliary head; None if built without."""

    def of(self, images: slice) -> "Prediction":
        """The prediction of some of the images."""
        return Prediction(*(None if tensor is None else tensor[images] for tensor in self))  # type: ignore[arg-type]


Maps = TypeVar("Maps", Tensor, FeatureMaps, Prediction)


def joined(parts: Sequence[Maps]) -> Maps:
    """Tensors, feature maps or predictions of several groups of images, joined to those of one batch, in order."""
    first: Any = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))  # type: ignore[arg-type]
    columns: Any = zip(*parts, strict=True)
    return type(first)(*(None if column[0] is None else torch.cat(column) for column in columns))


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the size (up to the stride), batch norm, ReLU.

    The convolution has no bias: the batch norm subtracts it again.
    """
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def subpixel_decoder(inputs: int, classes: int, doublings: int) -> nn.Sequential:
    """1x1 convolution to C channels, then `doublings` times sub-pixel convolution: [B,c,h,w] -> [B,C,h*2^n,w*2^n].

    The sub-pixels start out equal (ICNR, arXiv 1707.02937), which avoids a checkerboard. There is no batch norm, so a
    decoder has no statistics that its perturbed input could spoil.
    """
    first = nn.Conv2d(inputs, classes, 1, bias=False)
    nn.init.kaiming_normal_(first.weight, nonlinearity="relu")
    layers: list[nn.Module] = [first]
    for _ in range(doublings):
        wide = nn.Conv2d(classes, 4 * classes, 1)
        with torch.no_grad():
            wide.weight.copy_(nn.init.kaiming_normal_(torch.empty(classes, classes, 1, 1)).repeat_interleave(4, 0))
        layers += [wide, nn.ReLU(), nn.PixelShuffle(2)]
    return nn.Sequential(*layers)
