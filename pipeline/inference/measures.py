"""How good predictions are: counts that add up over images, whoever counts them, and the measures made of them."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.inference.class_table import mean_of
from pipeline.inference.evaluate import ConfusionMatrix

BINS = 15
"""Of confidence, each of equal width."""
DILATION = 0.02
"""How far a boundary reaches into its class, as a share of the image's diagonal (Cheng et al. 2021)."""
WORST = 12
"""Images of the lowest IoU that a tally keeps pictures of."""
_UNIT = 1 << 24
"""Confidences are summed as integers of this resolution, so that no order of summing gives another result."""
_OUTSIDE = -1


# ---- counts -----------------------------------------------------------------------------------------------------


class Bad(NamedTuple):
    """An image that the network sees badly; the first of several is the worst."""

    miou: float
    """Of this image alone, 0..1: the mean over the classes that it or its prediction shows."""
    id: str
    picture: np.ndarray
    """uint8 [h,w,3]: image, truth and prediction side by side."""


class Tally:
    """What was counted of one network's predictions. Tallies of parts of a set add up to that of the set, exactly.

    Args:
        num_classes: C.
        ignore_index: target value of pixels that count nowhere.
        device: where the counts are kept; that of the predictions.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu") -> None:
        self.confusion = ConfusionMatrix(num_classes, ignore_index, device)
        self.boundary = torch.zeros(2, num_classes, dtype=torch.int64, device=device)
        """int64 [2,C]: pixels that are on the boundary of a class in both maps, and in at least one."""
        self.bins = torch.zeros(3, BINS, dtype=torch.int64, device=device)
        """int64 [3,BINS] by confidence: pixels, the sum of their confidences in units of 2^-24, right ones."""
        self.images: dict[str, float] = {}
        """mIoU of each image alone, 0..1, by id; those without a scored pixel have none."""
        self.worst: list[Bad] = []
        """At most `WORST`, the lowest mIoU first."""

    def update(self, ids: Sequence[str], probability: Tensor, pred: Tensor, target: Tensor) -> None:
        """Adds images.

        Args:
            ids: of the images, B.
            probability: float32 [B,C,H,W], summing to 1 over C.
            pred: int64 [B,H,W], the predicted class.
            target: uint8 [B,H,W], class ids or the ignore index.

        Raises:
            ValueError: a target is neither a class nor the ignore index.
        """
        confusion, classes = self.confusion, self.confusion.num_classes
        for name, seen, truth in zip(ids, pred, target, strict=True):
            alone = ConfusionMatrix(classes, confusion.ignore_index, confusion.matrix.device)
            alone.update(seen, truth)
            confusion.matrix += alone.matrix
            if int(alone.matrix.sum()):
                self.images[name] = alone.scores().miou
        self.boundary += boundary_counts(pred, target, classes, confusion.ignore_index)
        self.bins += confidence_counts(probability, pred, target, confusion.ignore_index)

    def add(self, other: "Tally") -> None:
        """Adds what was counted of further images of the set, on the same device."""
        self.confusion.matrix += other.confusion.matrix
        self.boundary += other.boundary
        self.bins += other.bins
        self.images |= other.images
        self.keep(other.worst)

    def admits(self, miou: float, name: str) -> bool:
        """Whether an image is among the `WORST` so far."""
        return len(self.worst) < WORST or (miou, name) < self.worst[-1][:2]

    def keep(self, found: Sequence[Bad]) -> None:
        """Keeps pictures of the worst images out of those that it has and `found`."""
        self.worst = heapq.nsmallest(WORST, [*self.worst, *found], key=lambda each: each[:2])

    def to(self, device: str) -> "Tally":
        """The same counts on another device; this tally is not to be used any more."""
        self.confusion.matrix = self.confusion.matrix.to(device)
        self.boundary, self.bins = self.boundary.to(device), self.bins.to(device)
        return self

    @property
    def reliability(self) -> list["Bin"]:
        """How often the network is right, by how sure it is."""
        counts, sums, right = self.bins.tolist()
        return [
            Bin(count, total / count / _UNIT if count else 0.0, hits / count if count else 0.0)
            for count, total, hits in zip(counts, sums, right, strict=True)
        ]


class Bin(NamedTuple):
    """The scored pixels whose confidence is in one of `BINS` equal parts of 0..1; the upper end belongs to it."""

    pixels: int
    confidence: float
    """Their mean confidence, 0..1: the probability of the predicted class. 0 if there is no pixel."""
    accuracy: float
    """The share of them that is right. 0 if there is no pixel."""


def boundary(labels: Tensor) -> Tensor:
    """The pixels of each class that are near its contour.

    A pixel is, if one of another class, or one outside of the image, is at most d rows and d columns away, where d is
    `DILATION` of the image's diagonal, rounded, and at least 1 (Cheng et al. 2021, whose code erodes the mask d times
    with a square of 3x3).

    Args:
        labels: integers [B,H,W], 0 or above.

    Returns:
        bool [B,H,W].
    """
    reach = max(1, round(DILATION * math.hypot(*labels.shape[1:])))
    padded = torch.nn.functional.pad(labels.to(torch.int16), (reach,) * 4, value=_OUTSIDE)
    return _largest(padded, 2 * reach + 1) != -_largest(-padded, 2 * reach + 1)


def _largest(values: Tensor, width: int) -> Tensor:
    """The largest value of each square of `width`: [B,H,W] to [B,H-width+1,W-width+1], in log2(width) steps."""
    for _ in range(2):
        have = 1
        while have < width:
            step = min(have, width - have)
            values = torch.maximum(values[..., :-step], values[..., step:])
            have += step
        values = values.transpose(1, 2)
    return values


def boundary_counts(pred: Tensor, target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """The pixels of boundary IoU by class: on the boundary in both maps, and in at least one.

    What is ignored belongs to no class, in the truth and in the prediction.

    Args:
        pred: int64 [B,H,W].
        target: uint8 [B,H,W].
        classes: C.
        ignore_index: target value of what is ignored.

    Returns:
        int64 [2,C].
    """
    truth = target.long()
    seen = pred.masked_fill(truth == ignore_index, ignore_index)
    inner, outer = boundary(truth), boundary(seen)
    scored = truth != ignore_index
    both = _by_class(truth[inner & outer & scored & (truth == seen)], classes)
    return torch.stack(
        [both, _by_class(truth[inner & scored], classes) + _by_class(seen[outer & scored], classes) - both]
    )


def _by_class(values: Tensor, classes: int) -> Tensor:
    return torch.bincount(values, minlength=classes)


def confidence_counts(probability: Tensor, pred: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The pixels of the calibration error by confidence; takes what `Tally.update` does.

    Returns:
        int64 [3,BINS], as `Tally.bins`.
    """
    scored = target != ignore_index
    sure = probability.gather(1, pred.unsqueeze(1))[:, 0][scored].double().clamp_max(1)
    place = ((sure * BINS).ceil().long() - 1).clamp_min(0)
    units = (sure * _UNIT).round()  # sums below 2^53 are exact in float64
    rows = (None, units, (pred == target)[scored].double())
    return torch.stack([torch.bincount(place, weights, BINS).round().long() for weights in rows])


# ---- measures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """What a tally amounts to, each 0..1. A class has None where there is nothing to divide by."""

    miou: float
    """Mean of the IoU of the classes; 0 if nothing was scored."""
    iou: tuple[float | None, ...]
    """Intersection over union by class; None for a class that is neither in the truth nor in a prediction."""
    accuracy: tuple[float | None, ...]
    """Share of the pixels of a class that is predicted as it; None for a class that is not in the truth."""
    dice: tuple[float | None, ...]
    """Twice the intersection over the sum of both areas, by class; None as for `iou`."""
    boundary_iou: tuple[float | None, ...]
    """IoU of the boundaries by class (see `boundary`); None for a class without any."""
    mean_boundary_iou: float
    """Mean of those; 0 if nothing was scored."""
    pixel_accuracy: float
    """Share of right pixels; 0 if nothing was scored."""
    frequency_weighted_iou: float
    """IoU of the classes, each weighed with its share of the true pixels; 0 if nothing was scored."""
    calibration_error: float
    """Expected calibration error: over `BINS`, the mean of |accuracy - confidence|, weighed with their pixels."""


def measures(tally: Tally, absent: Literal["skip", "zero"] = "skip") -> Measures:
    """The measures of what was counted.

    Args:
        tally: of the whole set.
        absent: what the IoU of an absent class is, see `ConfusionMatrix.scores`.
    """
    confusion, scores = tally.confusion, tally.confusion.scores(absent)
    right, true, said = (
        each.tolist() for each in (confusion.intersection, confusion.matrix.sum(1), confusion.matrix.sum(0))
    )
    pixels = max(sum(true), 1)
    common, either = tally.boundary.tolist()
    edges = _ratios(common, either)
    return Measures(
        miou=scores.miou,
        iou=scores.iou,
        accuracy=_ratios(right, true),
        dice=_ratios([2 * count for count in right], [a + b for a, b in zip(true, said, strict=True)]),
        boundary_iou=edges,
        mean_boundary_iou=mean_of(edges) or 0.0,
        pixel_accuracy=scores.pixel_accuracy,
        frequency_weighted_iou=sum(count * (iou or 0.0) for count, iou in zip(true, scores.iou, strict=True)) / pixels,
        calibration_error=sum(each.pixels * abs(each.accuracy - each.confidence) for each in tally.reliability)
        / pixels,
    )


def _ratios(parts: Sequence[int], wholes: Sequence[int]) -> tuple[float | None, ...]:
    return tuple(part / whole if whole else None for part, whole in zip(parts, wholes, strict=True))
