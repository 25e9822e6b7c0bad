"""The network of student and teacher: image in, class scores and features out."""

import logging

import torch
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models.deeplab import DeepLabDecoder
from pipeline.models.encoders import build_encoder
from pipeline.models.parts import Channels, FeatureMaps, Prediction
from pipeline.models.tiny import TINY_CHANNELS, TinyDecoder, TinyEncoder

log = logging.getLogger(__name__)
MEAN_COLOUR = (123.675, 116.28, 103.53)
"""ImageNet mean in RGB, 0..255: what a pixel that says nothing looks like."""
COLOUR_STD = (58.395, 57.12, 57.375)


class SegmentationModel(nn.Module):
    """Normalisation, an encoder (Tensor -> FeatureMaps) and a decoder (FeatureMaps -> Prediction)."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, decoder: nn.Module, channels: Channels) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.channels = channels
        # constants, not state: they are in no checkpoint
        self.register_buffer("mean", torch.tensor(MEAN_COLOUR).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(COLOUR_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Prediction:
        """Scores a batch.

        Args:
            image: [B,3,H,W] uint8 RGB of any size, normalised here because bytes cross to a device sooner.
        """
        return self.decode(self.encode(image))

    def encode(self, image: Tensor) -> FeatureMaps:
        """The encoder's feature maps of uint8 [B,3,H,W]; for methods that look at them or change them."""
        return self.encoder(self.normalise(image).contiguous(memory_format=torch.channels_last))

    def decode(self, taps: FeatureMaps) -> Prediction:
        """Scores what the encoder saw."""
        return self.decoder(taps)

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 [B,3,H,W] as the encoder takes it: float of about zero mean and unit deviation."""
        return (image - self.mean) / self.std

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Parameters of the encoder, which may be pretrained and then learn slower."""
        return list(self.encoder.parameters())

    def head_parameters(self) -> list[nn.Parameter]:
        """All other parameters: decoder and heads."""
        return list(self.decoder.parameters())


def build_model(config: ModelConfig, num_classes: int, *, features: bool, aux: bool = False) -> SegmentationModel:
    """Makes a network with fresh heads; the random numbers are torch's global ones.

    Its parameters are in channels-last layout, which convolutions of CPUs and of tensor cores run faster in.

    Args:
        config: backbone, its weights and the sizes.
        num_classes: C of `Prediction.logits`.
        features: whether to add the representation head.
        aux: whether to add the auxiliary head.

    Raises:
        UserError: the weights cannot be had or do not fit.
    """
    build = _tiny if config.backbone == "tiny" else _deeplab
    model = SegmentationModel(*build(config, num_classes, features, aux))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


_Parts = tuple[nn.Module, nn.Module, Channels]
"""Encoder, decoder, and what the one hands to the other."""


def _tiny(config: ModelConfig, num_classes: int, features: bool, aux: bool) -> _Parts:
    if config.weights != "none":
        raise UserError(f"model.weights {config.weights}: tiny has no pretrained weights; use none or another backbone")
    log.info("encoder tiny: from scratch")
    decoder = TinyDecoder(TINY_CHANNELS, num_classes, config.feature_dim if features else 0, aux=aux)
    return TinyEncoder(TINY_CHANNELS), decoder, TINY_CHANNELS


def _deeplab(config: ModelConfig, num_classes: int, features: bool, aux: bool) -> _Parts:
    encoder, channels = build_encoder(config)
    return encoder, DeepLabDecoder(config, channels, num_classes, features=features, aux=aux), channels
