"""The all-MLP decoder of SegFormer (Xie et al., NeurIPS 2021) for hierarchical encoders."""

import torch
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.models.parts import Decoder, Encoder, FeatureMaps, conv_bn_relu
from pipeline.ops.grid import upsample


class SegFormerDecoder(Decoder):
    """Every map in `width` channels, resized to the finest one, merged by a 1x1 convolution.

    Args:
        config: width, feature_dim and dropout.
        encoder: gives channels and strides.
        num_classes: C.
        features: whether to add the representation head: 1x1, ReLU, 1x1.
        aux: whether to add the auxiliary head, at the resolution of `FeatureMaps.mid`.
    """

    def __init__(self, config: ModelConfig, encoder: Encoder, num_classes: int, *, features: bool, aux: bool) -> None:
        super().__init__()
        channels, width = encoder.channels, config.width
        self.stride = encoder.strides.low
        self.projections = nn.ModuleList(nn.Conv2d(each, width, 1) for each in channels.all)
        self.merge = conv_bn_relu(len(channels.all) * width, width, 1)
        self.classifier = nn.Sequential(nn.Dropout2d(config.dropout), nn.Conv2d(width, num_classes, 1))
        hidden = conv_bn_relu(width, width, 1) if features else nn.Identity()
        self.representation = nn.Sequential(hidden, nn.Conv2d(width, config.feature_dim, 1)) if features else None
        self.auxiliary = nn.Sequential(
            conv_bn_relu(channels.mid, width), nn.Dropout2d(config.dropout), nn.Conv2d(width, num_classes, 1)
        ) if aux else None  # fmt: skip

    def fused(self, maps: FeatureMaps) -> Tensor:
        """[B,width,h,w] at the resolution of `maps.low`."""
        size = (maps.low.shape[2], maps.low.shape[3])
        pairs = zip(self.projections, maps.levels, strict=True)
        return self.merge(torch.cat([upsample(project(each), size) for project, each in pairs], 1))
