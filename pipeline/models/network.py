"""The network of student and teacher: from an image to class logits and features."""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.batch import MEAN_COLOUR
from pipeline.config.backbones import DECODERS, find_backbone, find_decoder
from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models.parts import Decoder, Encoder, FeatureMaps, Prediction
from pipeline.models.recompute import In, Out, by_parts

COLOUR_STD = (58.395, 57.12, 57.375)
"""Standard deviation of ImageNet's colours in RGB, 0..255."""


class Scale(NamedTuple):
    """What an image is normalised with: numbers for each band, 0..255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


RGB = Scale(MEAN_COLOUR, COLOUR_STD)
"""Of photos."""


class SegmentationModel(nn.Module):
    """Normalisation, an encoder (Tensor -> FeatureMaps) and a decoder (FeatureMaps -> Prediction)."""

    mean: Tensor
    """float32 [3,1,1], mean colour in RGB, 0..255; of images that are no RGB the mean of each band."""
    std: Tensor
    """float32 [3,1,1], its standard deviation."""

    def __init__(self, encoder: Encoder, decoder: Decoder, micro_batches: int = 1, scale: Scale | None = None) -> None:
        """Puts the parts together.

        Args:
            encoder: Tensor to FeatureMaps.
            decoder: FeatureMaps to Prediction.
            micro_batches: in how many parts a batch passes in training, see `by_parts`; passes without gradient are
                whole.
            scale: mean and deviation of each band; None: of ImageNet's colours.
        """
        super().__init__()
        scale = scale or RGB
        self.micro_batches = micro_batches
        self.encoder = encoder
        self.decoder = decoder
        # constants, not state: they are in no checkpoint
        self.register_buffer("mean", torch.tensor(scale.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(scale.std).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Prediction:
        """The prediction of a batch.

        Args:
            image: uint8 [B,3,H,W], RGB, of any size, or of the bands that it was built for. It is normalised here, on
                the device: bytes are a quarter of the traffic of floats.
        """
        return self._by_parts(lambda part: self.decoder(self._encode(part)), image)

    def logits(self, image: Tensor) -> Tensor:
        """The logits of `forward` alone, for passes of which nothing else is read: other heads are not computed."""
        return self._by_parts(lambda part: self.decoder.logits(self._encode(part)), image)

    def encode(self, image: Tensor) -> FeatureMaps:
        """The encoder's feature maps of uint8 [B,3,H,W]; for methods that look at them or change them."""
        return self._by_parts(self._encode, image)

    def decode(self, maps: FeatureMaps) -> Prediction:
        """The prediction from feature maps of `encode`."""
        return self._by_parts(self.decoder, maps)

    def _encode(self, image: Tensor) -> FeatureMaps:
        return self.encoder(self.normalise(image).contiguous(memory_format=torch.channels_last))

    def _by_parts(self, function: Callable[[In], Out], given: In) -> Out:
        if self.micro_batches == 1 or not (self.training and torch.is_grad_enabled()):
            return function(given)
        return by_parts(self, function, given, self.micro_batches)

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 [B,3,H,W], RGB, to the encoder's input: float32 of about zero mean and unit deviation."""
        return (image - self.mean) / self.std

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Parameters of the encoder; pretrained ones often get a lower learning rate (`optim.head_lr_mult`)."""
        return list(self.encoder.parameters())

    def head_parameters(self) -> list[nn.Parameter]:
        """All other parameters: decoder and heads."""
        return list(self.decoder.parameters())


def build_model(
    config: ModelConfig,
    num_classes: int,
    *,
    features: bool,
    aux: bool = False,
    micro_batches: int = 1,
    scale: Scale | None = None,
) -> SegmentationModel:
    """Makes a network with freshly initialised decoder and heads, from torch's global random numbers.

    Its parameters are in channels-last layout, in which convolutions run faster on CPUs and tensor cores.

    Args:
        config: backbone, its weights, decoder and the sizes.
        num_classes: C of `Prediction.logits`.
        features: whether to add the representation head.
        aux: whether to add the auxiliary head.
        micro_batches: in how many parts a batch passes in training.
        scale: mean and deviation of each band of the images; None: they are RGB, with ImageNet's.

    Raises:
        UserError: the weights cannot be had or do not fit, or encoder and decoder do not.
    """
    backbone, decoder = find_backbone(config.backbone), find_decoder(config.decoder, config.backbone)
    encoder: Encoder = resolve_name(backbone.build)(config)
    scale = scale or RGB
    take_bands(encoder, len(scale.mean))
    if config.checkpoint_activations and not encoder.has_blocks:
        raise UserError(
            f"model.checkpoint_activations: the blocks of model.backbone {config.backbone} are not known here; "
            "--optim.accumulate needs less memory, too"
        )
    made: Decoder = resolve_name(DECODERS[decoder])(config, encoder, num_classes, features=features, aux=aux)
    encoder.recompute = config.checkpoint_activations
    model = SegmentationModel(encoder, made, micro_batches, scale)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def take_bands(encoder: nn.Module, bands: int) -> None:
    """Makes the first convolution of an encoder take so many bands in the place of RGB, in place.

    Each band gets the mean of the weights of red, green and blue, times 3 / bands: a grey image, the same in all bands,
    gives what it gave before. So pretrained weights stay of use, and from scratch it is a start like any other.
    """
    first = next(layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d))
    if bands == first.in_channels:
        return
    if first.in_channels != 3 or first.groups != 1:
        raise ValueError(f"the first convolution takes {first.in_channels} channels in {first.groups} groups")
    weight = first.weight.mean(1, keepdim=True).repeat(1, bands, 1, 1) * (3 / bands)
    first.weight, first.in_channels = nn.Parameter(weight.detach()), bands
