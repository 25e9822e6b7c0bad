"""Flaw maps of GCT (Ke et al., ECCV 2020): where a prediction is wrong, or thought to be."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.entropy import IGNORE


def gaussian_blur(x: Tensor, size: int) -> Tensor:
    """Blurs float [B,1,H,W] with a Gaussian of odd width near `size`; borders are mirrored.

    The deviation follows from the width by OpenCV's rule, as in the release.
    """
    width = size + 1 - size % 2
    sigma = 0.3 * ((width - 1) * 0.5 - 1) + 0.8
    offset = torch.arange(width, device=x.device, dtype=x.dtype) - width // 2
    kernel = (-0.5 * (offset / sigma).square()).exp()
    kernel = kernel / kernel.sum()
    padded = F.pad(x, (width // 2,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


def min_max(x: Tensor) -> Tensor:
    """Each image of float [B,1,H,W] stretched to 0..1; a constant one becomes 0."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low + 1e-9)


def flaw_target(probability: Tensor, truth: Tensor, mu: float, nu: int) -> Tensor:
    """What the detector shall say: the error of a prediction, spread out and stretched to 0..1 (release, pipeline C).

    Args:
        probability: float [B,C,H,W].
        truth: int64 [B,H,W]; 255 has no flaw (the release calls the whole probability there one).
        mu: weight of sum_c |onehot - p|, which is at most 2.
        nu: how often the blurred error is dilated and blurred again.

    Returns:
        float [B,1,H,W].
    """
    classes, height = probability.shape[1], probability.shape[2]
    known = truth != IGNORE
    onehot = F.one_hot(truth.clamp_max(classes - 1), classes).movedim(-1, 1)
    error = mu * (onehot - probability.detach()).abs().sum(1, keepdim=True) * known.unsqueeze(1)
    error = gaussian_blur(error, height // 8)
    for _ in range(nu):
        dilated = F.max_pool2d(F.pad(error, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
        error = gaussian_blur(dilated, height // 4)
    return min_max(error)


def handled(flaw: Tensor, clip: float = 0.1) -> Tensor:
    """A detector's raw output made comparable: positive part, blurred, 0..1; all 0 where no flaw exceeds `clip`.

    Args:
        flaw: float [B,1,H,W].
        clip: of the release.
    """
    smooth = gaussian_blur(flaw.detach().clamp_min(0.0), flaw.shape[2] // 16)
    return torch.where(smooth.amax((1, 2, 3), keepdim=True) > clip, min_max(smooth), 0.0)


class Exchange(NamedTuple):
    """What two networks learn from each other."""

    targets: tuple[Tensor, Tensor]
    """float [B,C,H,W] each, detached: a network's own probabilities where it is the better, else the other's."""
    both_bad: Tensor
    """bool [B,1,H,W], pixels that neither can teach."""


def exchange(left: Tensor, right: Tensor, left_flaw: Tensor, right_flaw: Tensor, limit: float) -> Exchange:
    """Dynamic consistency (paper eq. 5): per pixel, the prediction with the lower flaw is right.

    Args:
        left: float [B,C,H,W], probabilities.
        right: likewise.
        left_flaw: float [B,1,H,W] in 0..1, handled.
        right_flaw: likewise.
        limit: xi; flaws above count as 1, so two bad predictions leave each other alone.
    """
    left_bad, right_bad = left_flaw > limit, right_flaw > limit
    one, two = left_flaw.masked_fill(left_bad, 1.0), right_flaw.masked_fill(right_bad, 1.0)
    left, right = left.detach(), right.detach()
    return Exchange((torch.where(one <= two, left, right), torch.where(two <= one, right, left)), left_bad & right_bad)
