"""The encoders and decoders by name, and where each is made: `module:name`, imported when a network is built.

They are listed here, and not beside their code, as that needs torch: a name is checked before torch is imported.
"""

from typing import NamedTuple

from pipeline.config.parse import suggest
from pipeline.errors import UserError


class Backbone(NamedTuple):
    """What is known of an encoder before it is built."""

    build: str
    """Function that takes a `ModelConfig` and returns a `pipeline.models.parts.Encoder`."""
    decoder: str
    """The decoder that `model.decoder auto` means."""
    multiple: int = 1
    """What both sides of a training crop must be a multiple of."""


BUILT_IN = ("none", "torchvision", "timm")
"""The `model.weights` that are no place."""
_CNN = Backbone("pipeline.models.cnn:build", "deeplab")
_DINOV2 = Backbone("pipeline.models.vit:build", "dpt", 14)
BACKBONES = {
    "tiny": Backbone("pipeline.models.tiny:build", "tiny"),
    **dict.fromkeys(("mobilenet_v2", "resnet18", "resnet34", "resnet50", "resnet101"), _CNN),
    "vit_tiny": _DINOV2._replace(multiple=8),
    **dict.fromkeys(("dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14"), _DINOV2),
}
"""The encoders that need no further package, by name."""
TIMM = "timm/"
"""What a name of timm's begins with: `timm/convnext_tiny`."""
_OF_TIMM = Backbone("pipeline.models.timm_networks:build", "deeplab")
DECODERS = {
    "tiny": "pipeline.models.tiny:TinyDecoder",
    "deeplab": "pipeline.models.deeplab:DeepLabDecoder",
    "segformer": "pipeline.models.segformer:SegFormerDecoder",
    "dpt": "pipeline.models.dpt:DPTDecoder",
}
"""The decoders: classes made of a `ModelConfig`, an `Encoder`, the number of classes, `features` and `aux`."""


def find_backbone(name: str) -> Backbone:
    """What is known of the encoder of that name; whether timm has one, only timm knows.

    Raises:
        UserError: there is none.
    """
    if name.startswith(TIMM):
        return _OF_TIMM
    if name not in BACKBONES:
        raise UserError(f"model.backbone: {name!r} is not known{suggest(name, [*BACKBONES, f'{TIMM}NAME'])}")
    return BACKBONES[name]


def find_decoder(name: str, backbone: str) -> str:
    """The decoder that `model.decoder` means beside this encoder: a key of `DECODERS`.

    Raises:
        UserError: there is none.
    """
    if name not in ("auto", *DECODERS):
        raise UserError(f"model.decoder: {name!r} is not known{suggest(name, ['auto', *DECODERS])}")
    return find_backbone(backbone).decoder if name == "auto" else name


def check_crop(crop: tuple[int, int], backbone: str) -> None:
    """Refuses training crops that an encoder cannot cut into its patches.

    Raises:
        UserError: names the nearest crop that fits.
    """
    multiple = find_backbone(backbone).multiple
    fits = [max(1, round(side / multiple)) * multiple for side in crop]
    if fits != list(crop):
        raise UserError(
            f"data.crop {crop[0]},{crop[1]}: model.backbone {backbone} takes multiples of {multiple}; "
            f"pass --data.crop {fits[0]},{fits[1]}"
        )
