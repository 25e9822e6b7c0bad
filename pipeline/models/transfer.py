"""A network that begins with what another one of the same architecture has learnt, also of other classes."""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.models.network import SegmentationModel

HEADS = ("classifier", "representation", "auxiliary")
"""Parts of a decoder that a network may lack, but for the first one."""
CLASS_HEADS = ("classifier", "auxiliary")
"""Those whose last layer has a row for each class."""


@torch.no_grad()
def take_over(
    network: SegmentationModel, source: SegmentationModel, rows: Sequence[int | None], *, encoder_only: bool = False
) -> None:
    """Copies parameters and buffers of `source` into `network`, in place; heads that `source` lacks stay as they are.

    Args:
        network: changed; it has C classes.
        source: of the same architecture, with any classes.
        rows: C entries: the class of `source` whose rows of the last layers are taken; None: they stay as they are.
        encoder_only: leave the decoder as it is.
    """
    theirs, by_class = source.state_dict(), _class_keys(network)
    for key, mine in network.state_dict().items():  # these share their memory with the network
        if key not in theirs or (encoder_only and not key.startswith("encoder.")):
            continue
        if key not in by_class:
            mine.copy_(theirs[key])
            continue
        for row, taken in enumerate(rows):
            if taken is not None:
                mine[row].copy_(theirs[key][taken])


def has_head(network: SegmentationModel, name: str) -> bool:
    """Whether the decoder has a head of `HEADS`."""
    return getattr(network.decoder, name) is not None


def _class_keys(network: SegmentationModel) -> set[str]:
    """Keys of the parameters that have a row for each class."""
    convolutions = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    last = [[name for name in convolutions if f"{name}.".startswith(f"decoder.{head}.")][-1:] for head in CLASS_HEADS]
    return {f"{name}.{kind}" for names in last for name in names for kind in ("weight", "bias")}
