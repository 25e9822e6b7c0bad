"""The network of student and teacher: from an image to class logits and features."""

import logging

import torch
from torch import Tensor, nn

from pipeline.batch import MEAN_COLOUR
from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models.deeplab import DeepLabDecoder
from pipeline.models.encoders import build_encoder
from pipeline.models.parts import Channels, FeatureMaps, Prediction
from pipeline.models.tiny import TINY_CHANNELS, TinyDecoder, TinyEncoder

log = logging.getLogger(__name__)
COLOUR_STD = (58.395, 57.12, 57.375)
"""Standard deviation of ImageNet's colours in RGB, 0..255."""


class SegmentationModel(nn.Module):
    """Normalisation, an encoder (Tensor -> FeatureMaps) and a decoder (FeatureMaps -> Prediction)."""

    mean: Tensor
    """float32 [3,1,1], mean colour in RGB, 0..255."""
    std: Tensor
    """float32 [3,1,1], its standard deviation."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, channels: Channels) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.channels = channels
        # constants, not state: they are in no checkpoint
        self.register_buffer("mean", torch.tensor(MEAN_COLOUR).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(COLOUR_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Prediction:
        """The prediction of a batch.

        Args:
            image: uint8 [B,3,H,W], RGB, of any size. It is normalised here, on the device: bytes are a quarter of the
                traffic of floats.
        """
        return self.decode(self.encode(image))

    def encode(self, image: Tensor) -> FeatureMaps:
        """The encoder's feature maps of uint8 [B,3,H,W]; for methods that look at them or change them."""
        return self.encoder(self.normalise(image).contiguous(memory_format=torch.channels_last))

    def decode(self, maps: FeatureMaps) -> Prediction:
        """The prediction from feature maps of `encode`."""
        return self.decoder(maps)

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 [B,3,H,W], RGB, to the encoder's input: float32 of about zero mean and unit deviation."""
        return (image - self.mean) / self.std

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Parameters of the encoder; pretrained ones often get a lower learning rate (`optim.head_lr_mult`)."""
        return list(self.encoder.parameters())

    def head_parameters(self) -> list[nn.Parameter]:
        """All other parameters: decoder and heads."""
        return list(self.decoder.parameters())


def build_model(config: ModelConfig, num_classes: int, *, features: bool, aux: bool = False) -> SegmentationModel:
    """Makes a network with freshly initialised decoder and heads, from torch's global random numbers.

    Its parameters are in channels-last layout, in which convolutions run faster on CPUs and tensor cores.

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
"""Encoder, decoder, and the channels of the feature maps between them."""


def _tiny(config: ModelConfig, num_classes: int, features: bool, aux: bool) -> _Parts:
    if config.weights != "none":
        raise UserError(f"model.weights {config.weights}: tiny has no pretrained weights; use none or another backbone")
    log.info("encoder tiny: from scratch")
    decoder = TinyDecoder(TINY_CHANNELS, num_classes, config.feature_dim if features else 0, aux=aux)
    return TinyEncoder(TINY_CHANNELS), decoder, TINY_CHANNELS


def _deeplab(config: ModelConfig, num_classes: int, features: bool, aux: bool) -> _Parts:
    encoder, channels = build_encoder(config)
    return encoder, DeepLabDecoder(config, channels, num_classes, features=features, aux=aux), channels
