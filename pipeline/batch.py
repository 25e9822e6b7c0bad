"""What flows from ingest to a method: the batch. Depends on torch alone, so both sides may import it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MEAN_COLOUR = (123.675, 116.28, 103.53)
"""ImageNet's mean colour in RGB, 0..255; networks subtract it."""
PADDING_COLOUR = (124, 116, 104)
"""Colour of padding in RGB: the mean colour in bytes, so padding is about 0 after normalisation."""


def padding_of(mean: Sequence[float]) -> tuple[int, ...]:
    """Value of padding in each band, 0..255: `mean` in bytes, or of RGB `PADDING_COLOUR` if none is given."""
    return tuple(round(value) for value in mean) if mean else PADDING_COLOUR


@dataclass(frozen=True)
class Views:
    """The images of one side of the batch."""

    image: Tensor
    """uint8 [B,3,H,W], or another number of bands; weak view (resize, crop, flip); padding as `padding_of` says."""
    mask: Tensor | None
    """int64 [B,H,W] class ids, 255 ignored; None on the unlabeled side."""
    valid: Tensor
    """bool [B,H,W], False on padding, and everywhere if the image was damaged."""
    ids: tuple[str, ...]
    """Id of each image."""
    strong: tuple[Tensor, ...] = ()
    """Strong views, each uint8 [B,3,H,W]: `image` in other colours, with the same geometry."""
    pseudo: Tensor | None = None
    """int64 [B,H,W], pseudo-labels made beforehand (255: no label); None unless the method asks for them."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every view."""
        return self.image.shape[-2], self.image.shape[-1]

    @property
    def truth(self) -> Tensor:
        """The mask of a labeled side.

        Raises:
            ValueError: there is none.
        """
        if self.mask is None:
            raise ValueError("the labeled side of a batch has masks")
        return self.mask

    def to(self, device: torch.device) -> "Views":
        """The same views on `device`."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        mask, pseudo = (None if each is None else moved(each) for each in (self.mask, self.pseudo))
        return Views(moved(self.image), mask, moved(self.valid), self.ids, tuple(map(moved, self.strong)), pseudo)


@dataclass(frozen=True)
class Batch:
    """One step's images on one rank; `unlabeled` is None for methods that need none."""

    labeled: Views
    unlabeled: Views | None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(self.labeled.to(device), self.unlabeled.to(device) if self.unlabeled else None)
