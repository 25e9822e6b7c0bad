"""The DeepLabV3+ decoder with U2PL's heads (arXiv 1802.02611 and 2203.03884; layout of the U2PL release)."""

import torch
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.models.parts import Decoder, Encoder, FeatureMaps, conv_bn_relu
from pipeline.ops.grid import upsample

RATES = {8: (12, 24, 36), 16: (6, 12, 18)}
"""Dilations of the spatial pyramid by output stride."""


class SpatialPyramid(nn.Module):
    """ASPP: five parallel branches of different receptive fields over [B,inputs,h,w], merged to [B,width,h,w].

    The image-wide branch has no batch norm. It has one cell per image, so its statistics would be those of B
    numbers: noise for few images, an error for one.
    """

    def __init__(self, inputs: int, width: int, rates: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, width, 1), nn.ReLU(inplace=True))
        ranges = [conv_bn_relu(inputs, width, dilation=rate) for rate in rates]
        self.branches = nn.ModuleList([pool, conv_bn_relu(inputs, width, 1), *ranges])
        self.merge = nn.Sequential(conv_bn_relu(len(self.branches) * width, width), nn.Dropout2d(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """[B,inputs,h,w] float to [B,width,h,w]; the image-wide branch is repeated over all cells."""
        outputs = [branch(x).expand(-1, -1, *x.shape[2:]) for branch in self.branches]
        # joined along the last axis in memory: a repeated cell has no layout, and by it the others would lose theirs
        joined = torch.cat([output.permute(0, 2, 3, 1) for output in outputs], dim=3)
        return self.merge(joined.permute(0, 3, 1, 2))


class DeepLabDecoder(Decoder):
    """`FeatureMaps` of a convolutional encoder to a `Prediction` at the stride of `FeatureMaps.low`, 4.

    Args:
        config: width, feature_dim, dropout and output stride.
        encoder: gives the channels.
        num_classes: C.
        features: whether to add the representation head.
        aux: whether to add the auxiliary head, at the resolution of `FeatureMaps.mid`.
    """

    def __init__(self, config: ModelConfig, encoder: Encoder, num_classes: int, *, features: bool, aux: bool) -> None:
        super().__init__()
        channels, width, dropout = encoder.channels, config.width, config.dropout
        self.stride = encoder.strides.low
        self.pyramid = SpatialPyramid(channels.high, width, RATES[config.output_stride], dropout)
        self.low = conv_bn_relu(channels.low, width, 1)
        self.classifier = _head(2 * width, width, num_classes, dropout)
        self.representation = _head(2 * width, width, config.feature_dim, dropout) if features else None
        self.auxiliary = nn.Sequential(
            conv_bn_relu(channels.mid, width), nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1)
        ) if aux else None  # fmt: skip

    def fused(self, maps: FeatureMaps) -> Tensor:
        """`low` and, upsampled to its resolution, the pyramid's output: [B,2*width,h,w]."""
        low = self.low(maps.low)
        wide = upsample(self.pyramid(maps.high), (low.shape[2], low.shape[3]))
        return torch.cat([low, wide], dim=1)


def _head(inputs: int, width: int, outputs: int, dropout: float) -> nn.Sequential:
    """Two 3x3 convolutions with dropout and a 1x1 convolution: [B,inputs,h,w] to [B,outputs,h,w]."""
    return nn.Sequential(
        conv_bn_relu(inputs, width), nn.Dropout2d(dropout),
        conv_bn_relu(width, width), nn.Dropout2d(dropout),
        nn.Conv2d(width, outputs, 1),
    )  # fmt: skip
