"""The flaw detector of GCT (Ke et al., ECCV 2020): an image and its prediction in, a map of mistakes out."""

import torch
from torch import Tensor, nn

from pipeline.ops.grid import upsample


class FlawDetector(nn.Module):
    """Eight 4x4 convolutions that see an image and its prediction; five of them halve the size.

    Each pads by 2 (release: 1), so that crops below 60 pixels do not shrink to nothing.

    Args:
        inputs: channels, 3 + C.
        width: channels of the first layer.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for factor, stride in ((1, 2), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1)):
            convolution = nn.Conv2d(inputs, factor * width, 4, stride, padding=2)
            layers += [convolution, HalfInstanceNorm(factor * width), nn.LeakyReLU(0.2)]
            inputs = factor * width
        self.layers = nn.Sequential(*layers, nn.Conv2d(inputs, 1, 4, 2, padding=2))

    def forward(self, normal: Tensor, probability: Tensor) -> Tensor:
        """Flaws, about 0..1 but not bounded: float [B,1,H,W].

        Args:
            normal: float [B,3,H,W], normalised image.
            probability: float [B,C,H,W].
        """
        flaw = self.layers(torch.cat([normal, probability], 1))
        return upsample(flaw, (normal.shape[2], normal.shape[3]))


class HalfInstanceNorm(nn.Module):
    """Batch norm of the first half of the channels, instance norm without parameters of the rest (IBN)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.batch = nn.BatchNorm2d((channels + 1) // 2)
        self.instance = nn.InstanceNorm2d(channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B,c,h,w] to the same."""
        half = self.batch.num_features
        return torch.cat([self.batch(x[:, :half]), self.instance(x[:, half:])], 1)
