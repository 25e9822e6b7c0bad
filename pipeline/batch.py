"""What flows from ingest to a method: the batch. Depends on torch alone, so both sides may import it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Views:
    """The images of one side of the batch."""

    image: Tensor
    """uint8 [B,3,H,W], weak view (resize, crop, flip); padding has the mean colour."""
    mask: Tensor | None
    """int64 [B,H,W] class ids, 255 ignored; None on the unlabeled side."""
    valid: Tensor
    """bool [B,H,W], False where padded or where the image was damaged."""
    ids: tuple[str, ...]

    def to(self, device: torch.device) -> "Views":
        """The same views on `device`."""
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return Views(self.image.to(device, non_blocking=True), mask, self.valid.to(device, non_blocking=True), self.ids)


@dataclass(frozen=True)
class Batch:
    """One step's images on one rank; `unlabeled` is None for methods that need none."""

    labeled: Views
    unlabeled: Views | None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(self.labeled.to(device), self.unlabeled.to(device) if self.unlabeled else None)


@dataclass(frozen=True)
class ViewSpec:
    """Which views a method needs."""

    unlabeled: bool
    """Whether it looks at unlabeled images at all."""
