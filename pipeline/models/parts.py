"""What encoders, decoders and the network share: the types of the tensors between them, and small building blocks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pipeline.models.recompute import blocks, recomputed
from pipeline.ops.grid import upsample


class FeatureMaps(NamedTuple):
    """What an encoder hands to a decoder: three or four float feature maps, each of a level of the network."""

    low: Tensor
    """[B,c,h,w] of an early level, the finest of the maps."""
    mid: Tensor
    """[B,c,h,w] of the level before the last, input of the auxiliary head."""
    high: Tensor
    """[B,c,h,w] of the last level, the coarsest of the maps."""
    between: Tensor | None = None
    """[B,c,h,w] of a level between `low` and `mid`; None in encoders of three levels."""

    @property
    def levels(self) -> list[Tensor]:
        """The maps in the order of the network."""
        return [each for each in (self.low, self.between, self.mid, self.high) if each is not None]

    def of(self, images: slice) -> "FeatureMaps":
        """The feature maps of some of the images."""
        return self.changed(lambda _, each: each[images])

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> "FeatureMaps":
        """The maps that `change` makes of the name and the content of each."""
        pairs = zip(self._fields, self, strict=True)
        return FeatureMaps(*(None if each is None else change(name, each) for name, each in pairs))  # type: ignore[arg-type]


class Levels(NamedTuple):
    """A whole number for each of the `FeatureMaps`: channels, or input pixels per cell."""

    low: int
    """Of the finest map."""
    mid: int
    """Of the map before the last."""
    high: int
    """Of the last map."""
    between: int = 0
    """Of the map between `low` and `mid`; 0 if there is none."""

    @property
    def all(self) -> list[int]:
        """The numbers in the order of the network."""
        return [each for each in (self.low, self.between, self.mid, self.high) if each]


class Prediction(NamedTuple):
    """The network's output for a batch, at the decoder's stride."""

    logits: Tensor
    """[B,C,h,w] float."""
    features: Tensor | None
    """[B,D,h,w] float output of the representation head, not normalised; None if built without."""
    aux: Tensor | None
    """[B,C,h',w'] float logits of the auxiliary head; None if built without."""

    def of(self, images: slice) -> "Prediction":
        """The prediction of some of the images."""
        return Prediction(*(None if tensor is None else tensor[images] for tensor in self))  # type: ignore[arg-type]


class Encoder(nn.Module, ABC):
    """Normalised float image [B,3,H,W] to `FeatureMaps`."""

    channels: Levels
    """Channels of its maps."""
    strides: Levels
    """Input pixels per cell of its maps."""
    embeddings: tuple[str, ...] = ()
    """Names of parameters that, as norms and biases, get no weight decay with `optim.decay_norms false`."""
    recompute: bool = False
    """Whether its blocks hold their inputs alone in training."""
    has_blocks: bool = True
    """Whether it can do so."""
    weights_digest: str = ""
    """Of the weights that it began with, see `weights.digest`; empty: from scratch."""

    @abstractmethod
    def forward(self, x: Tensor) -> FeatureMaps:
        """The maps of images of any size."""

    def run(self, stage: nn.Module, x: Tensor) -> Tensor:
        """`stage(x)`, with each of its blocks recomputed where that is asked for."""
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return stage(x)  # type: ignore[no-any-return]
        for block in blocks(stage):
            x = recomputed(block, block, x)
        return x

    def layers(self) -> list[list[nn.Parameter]]:
        """All its parameters by depth, for `optim.layer_decay`: unless overridden, those of each of its parts."""
        return [found for child in self.children() if (found := list(child.parameters()))]


class StagedEncoder(Encoder):
    """Three stages, one after the other."""

    def __init__(self, channels: Levels, strides: Levels, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.channels, self.strides = channels, strides
        self.low, self.mid, self.high = stages

    def forward(self, x: Tensor) -> FeatureMaps:
        """Runs the stages."""
        low = self.run(self.low, x)
        mid = self.run(self.mid, low)
        return FeatureMaps(low, mid, self.run(self.high, mid))


class Decoder(nn.Module, ABC):
    """`FeatureMaps` to a `Prediction`: what all heads read, and the heads."""

    stride: float
    """Input pixels per cell of logits and features."""
    classifier: nn.Module
    """Logits of the C classes, [B,C,h,w]."""
    representation: nn.Module | None
    """Features of the contrast, [B,D,h,w]."""
    auxiliary: nn.Module | None
    """Logits out of `FeatureMaps.mid`."""

    @abstractmethod
    def fused(self, maps: FeatureMaps) -> Tensor:
        """What classifier and representation head read: [B,c,h,w] at the decoder's stride."""

    def forward(self, maps: FeatureMaps) -> Prediction:
        """The prediction of all heads."""
        x = self.fused(maps)
        features = None if self.representation is None else self.representation(x)
        aux = None if self.auxiliary is None else self.auxiliary(maps.mid)
        return Prediction(self.classifier(x), features, aux)

    def logits(self, maps: FeatureMaps) -> Tensor:
        """The logits alone: the other heads are not computed."""
        return self.classifier(self.fused(maps))  # type: ignore[no-any-return]


Maps = TypeVar("Maps", Tensor, FeatureMaps, Prediction)


def joined(parts: Sequence[Maps]) -> Maps:
    """Tensors, feature maps or predictions of several groups of images, joined to those of one batch, in order."""
    first: Any = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))  # type: ignore[arg-type]
    columns: Any = zip(*parts, strict=True)
    return type(first)(*(None if column[0] is None else torch.cat(column) for column in columns))


def at_multiple(image: Tensor, multiple: int) -> Tensor:
    """Float [B,c,H,W] resized to the nearest multiples on both sides, at least one; exported programs can do it."""
    height, width = (max(1, (2 * side + multiple) // (2 * multiple)) * multiple for side in image.shape[2:])
    return upsample(image, (height, width))


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
