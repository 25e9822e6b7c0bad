"""Scores of a whole set from one confusion matrix: every pixel counts once, whatever image it is in."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says, all in 0..1."""

    miou: float
    """Mean of the IoU of the classes; 0 if nothing was scored."""
    iou: tuple[float | None, ...]
    """Intersection over union by class; None for an absent class."""
    pixel_accuracy: float
    """Share of right pixels; 0 if nothing was scored."""


class ConfusionMatrix:
    """Counts pixels by (target, prediction).

    Args:
        num_classes: C.
        ignore_index: target value of pixels that are not scored.
        device: where the counts are kept; that of the predictions.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        """int64 [C,C]: row = target, column = prediction."""

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Adds pixels.

        Args:
            pred: uint8 or int64 [...], 0..C-1.
            target: uint8 or int64 of the same shape, 0..C-1 or the ignore index.

        Raises:
            ValueError: a target is neither a class nor the ignore index.
        """
        cells = target.long() * self.num_classes + pred.long() + 1
        cells = cells.masked_fill(target == self.ignore_index, 0)  # cell 0 gathers what is not scored
        counts = torch.bincount(cells.flatten(), minlength=self.num_classes**2 + 1)
        if len(counts) > self.num_classes**2 + 1:
            raise ValueError(f"a target is neither one of {self.num_classes} classes nor {self.ignore_index}")
        self.matrix += counts[1:].view_as(self.matrix)

    def all_reduce(self) -> None:
        """Adds up the counts of all ranks, on all ranks; nothing happens in a single process."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.matrix)

    @property
    def intersection(self) -> Tensor:
        """Right pixels by class, int64 [C]."""
        return self.matrix.diagonal()

    @property
    def union(self) -> Tensor:
        """Pixels by class that are or were said to be of it, int64 [C]."""
        return self.matrix.sum(0) + self.matrix.sum(1) - self.intersection

    def scores(self, absent: Literal["skip", "zero"] = "skip") -> Scores:
        """The scores so far.

        Args:
            absent: what a class counts that no target and no prediction names. skip: it is left out of the mean
                and its IoU is None. zero: 0, as in the U2PL release. A class that is predicted but never the
                target counts 0 either way.
        """
        pairs = zip(self.intersection.tolist(), self.union.tolist(), strict=True)
        empty = None if absent == "skip" else 0.0
        iou = tuple(right / total if total else empty for right, total in pairs)
        present = [value for value in iou if value is not None]
        pixels = int(self.matrix.sum())
        return Scores(
            miou=sum(present) / max(len(present), 1),
            iou=iou,
            pixel_accuracy=int(self.intersection.sum()) / max(pixels, 1),
        )
