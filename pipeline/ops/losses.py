"""Losses over pixels. Each is this rank's share of the mean over all ranks.

A share is the local sum divided by the mean count per rank: DDP's averaging of gradients then gives exactly the mean
over the global batch, whatever the number of ranks and wherever the ignored pixels lie. Only counts are reduced, never
a loss that is differentiated.

A loss over a part of the pixels has three normalisers in the literature: `kept` divides by the pixels that carry the
loss, `valid` by all pixels that are not padding, `all` by every pixel. The results differ by factors of up to one over
the share of kept pixels; it is the commonest silent difference between re-implementations.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.entropy import IGNORE
from pipeline.ops.grid import FullGrid, Grid
from pipeline.ops.world import World

# ---- over all pixels with a label -------------------------------------------------------------------------------


def mean_count(mask: Tensor, world: World) -> Tensor:
    """Number of True entries, averaged over the ranks and at least 1: float32, 0-dim."""
    return (world.sum(mask.sum()).float() / world.size).clamp_min(1.0)


def cross_entropy(logits: Tensor, target: Tensor, world: World, grid: Grid | None = None) -> Tensor:
    """Mean cross entropy over the pixels that are not ignored, 0 if there are none.

    Args:
        logits: float [B,C,H,W]; with a grid, at the network's resolution.
        target: int64 [B,H,W], 255 ignored; with a grid, in its order.
        world: ranks that share the mean.
        grid: relates logits of a coarser resolution to the pixels; None: they are of the same size.
    """
    total = (grid or FullGrid.of(target)).cross_entropy(logits, target)
    return total / mean_count(target != IGNORE, world)


def ohem_cross_entropy(
    logits: Tensor, target: Tensor, world: World, threshold: float = 0.7, min_kept: int = 100_000
) -> Tensor:
    """Cross entropy of the hard pixels: those whose true class has probability <= `threshold`.

    If fewer than `min_kept` pixels of a rank are that hard, its `min_kept` hardest count; with fewer valid pixels, all.

    Args:
        logits: float [B,C,H,W].
        target: int64 [B,H,W], 255 ignored.
        world: ranks that share the mean; the selection is of each rank.
        threshold: in 0..1.
        min_kept: least number of pixels that count, per rank.
    """
    valid = target != IGNORE
    with torch.no_grad():
        picked = logits.float().softmax(1).gather(1, target.clamp_max(logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        ordered = picked.masked_fill(~valid, 2.0).flatten().sort().values  # ignored pixels last
        limit = ordered[min(min_kept, len(ordered)) - 1].clamp_min(threshold)
        kept = torch.where(valid.sum() < min_kept, valid, valid & (picked <= limit))
    return cross_entropy(logits, target.masked_fill(~kept, IGNORE), world)


def focal_cross_entropy(
    logits: Tensor, target: Tensor, world: World, weights: Tensor | None = None, gamma: float = 0.0
) -> Tensor:
    """sum_i w_i (1 - p_i)^gamma CE_i / sum_i w_i over the pixels that are not ignored, 0 if there are none.

    p_i is the probability of pixel i's class, and w_i the weight of that class. With gamma 0 it is the mean of
    `torch.nn.CrossEntropyLoss` with weights; else the focal loss (Lin et al., ICCV 2017, eq. 5), which divides by the
    objects of a detector where this divides by weighted pixels.

    Args:
        logits: float [B,C,H,W].
        target: int64 [B,H,W], 255 ignored.
        world: ranks that share the mean.
        weights: float32 [C] >= 0, by class; None: all 1.
        gamma: 0 or above.
    """
    valid = target != IGNORE
    losses = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")
    if gamma:
        losses = losses * (1.0 - (-losses).exp()).clamp_min(1e-6) ** gamma  # at 0 a root has no finite slope
    weight = valid.float() if weights is None else valid * weights[target.masked_fill(~valid, 0)]
    return (losses * weight).sum() / (world.sum(weight.sum()) / world.size).clamp_min(1e-12)


def dice_loss(logits: Tensor, target: Tensor, world: World) -> Tensor:
    """1 - mean over classes of 2 sum_i p_i y_i / (sum_i p_i + sum_i y_i): soft Dice, float32, 0-dim.

    Sums run over the pixels of the global batch that are not ignored, the mean over the classes that these show; 0 if
    there are none. The denominator has no squares (Milletari et al., 3DV 2016, have them).

    It is no mean over pixels, so a rank's share has the value of the whole, and the rank's part of its gradient.

    Args:
        logits: float [B,C,H,W].
        target: int64 [B,H,W], 255 ignored.
        world: ranks that share the batch.
    """
    valid = (target != IGNORE).unsqueeze(1)
    found = logits.float().softmax(1) * valid
    truth = torch.zeros_like(found).scatter_(1, target.clamp_max(logits.shape[1] - 1).unsqueeze(1), valid.float())
    both, size, pixels = (each.sum((0, 2, 3)) for each in (found * truth, found + truth, truth))
    all_both, all_size, all_pixels = world.sum(torch.stack([both, size, pixels]))
    shown = all_pixels > 0
    weight = shown / shown.sum().clamp_min(1)
    all_size = all_size.clamp_min(1.0)
    value = (weight * (1.0 - 2.0 * all_both / all_size)).sum()
    slope = world.size * (weight * 2.0 * (all_both / all_size.square() * size - both / all_size)).sum()
    return value + slope - slope.detach()


def unsupervised_cross_entropy(
    logits: Tensor, pseudo_label: Tensor, shown: Tensor, world: World, grid: Grid | None = None
) -> Tensor:
    """L_u of U2PL: mean cross entropy over the reliable pixels, times shown pixels / reliable pixels (eq. 8, eta = 1).

    The paper's eq. 8 counts all B x H x W pixels. Here padding is neither reliable nor shown. The release labels
    padding too, so there it makes no difference.

    Args:
        logits: as for `cross_entropy`.
        pseudo_label: as its target; unreliable pixels are 255.
        shown: bool [B,H,W], pixels that are not padding, in any order.
        world: ranks that share the mean.
        grid: as for `cross_entropy`.
    """
    grid = grid or FullGrid.of(pseudo_label)
    reliable = mean_count(pseudo_label != IGNORE, world)
    return grid.cross_entropy(logits, pseudo_label) * mean_count(shown, world) / reliable.square()


# ---- over pixels of which some do not count ---------------------------------------------------------------------


Normaliser = Literal["kept", "valid", "all"]


def pixel_count(kept: Tensor, valid: Tensor, over: Normaliser, world: World) -> Tensor:
    """The divisor of a sum over pixels: their number, averaged over the ranks and at least 1; float32, 0-dim.

    Args:
        kept: bool [B,H,W], pixels that carry the loss.
        valid: bool [B,H,W], pixels that are not padding.
        over: which pixels are counted.
        world: ranks that share the mean; each has B images.
    """
    if over == "all":
        return torch.full((), float(kept.numel()), device=kept.device)
    return mean_count(kept if over == "kept" else valid, world)


def masked_cross_entropy(logits: Tensor, target: Tensor, valid: Tensor, world: World, over: Normaliser) -> Tensor:
    """Mean cross entropy, 0-dim float32; where no pixel has a label it is 0 and still has a gradient.

    Args:
        logits: float [B,C,H,W].
        target: int64 [B,H,W]; pixels that are not 255 are the kept ones.
        valid: bool [B,H,W], pixels that are not padding.
        world: ranks that share the mean.
        over: the normaliser.
    """
    total = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum")
    return total / pixel_count(target != IGNORE, valid, over, world)


def soft_cross_entropy(logits: Tensor, target: Tensor, valid: Tensor, world: World) -> Tensor:
    """Mean of -sum_c q_c log p_c over the valid pixels, 0 without any.

    Args:
        logits: float [B,C,H,W], get the gradient.
        target: float [B,C,H,W], probabilities q, held fixed.
        valid: bool [B,H,W].
        world: ranks that share the mean.
    """
    losses = -(target.detach().float() * logits.float().log_softmax(1)).sum(1)
    return torch.where(valid, losses, 0.0).sum() / mean_count(valid, world)


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, world: World) -> Tensor:
    """sum_i w_i CE_i / sum_i w_i, float32, 0-dim; 0 if all weights are 0.

    Args:
        logits: float [B,C,H,W], get the gradient.
        target: int64 [B,H,W]; where it is 255 the cross entropy counts as 0, so the weight should be 0 too.
        weight: float [B,H,W] >= 0, held fixed.
        world: ranks that share the sums.
    """
    weight = weight.detach().float()
    losses = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")
    return (losses * weight).sum() / (world.sum(weight.sum()) / world.size).clamp_min(1e-12)


def squared_error(one: Tensor, two: Tensor, valid: Tensor, world: World, over: Normaliser) -> Tensor:
    """Mean over pixels of sum_c (one_c - two_c)^2, 0-dim float32; pixels that are not valid add nothing.

    Divide by C for what `torch.nn.MSELoss` means, a mean over channels too.

    Args:
        one: float [B,C,H,W].
        two: float [B,C,H,W].
        valid: bool [B,H,W], the pixels that carry the loss: `kept` and `valid` are the same normaliser here.
        world: ranks that share the mean.
        over: the normaliser.
    """
    distance = (one.float() - two.float()).square().sum(1)
    return torch.where(valid, distance, 0.0).sum() / pixel_count(valid, valid, over, world)


def probability_mse(logits: Tensor, probability: Tensor, valid: Tensor, world: World, over: Normaliser) -> Tensor:
    """`squared_error` between the softmax of `logits` [B,C,H,W] and a target of probabilities [B,C,H,W]."""
    return squared_error(logits.float().softmax(1), probability, valid, world, over)


def confident_share(confidence: Tensor, valid: Tensor, threshold: float, world: World) -> Tensor:
    """Share of the valid pixels of all ranks with confidence >= threshold: float32 0-dim, 0 if none is valid.

    Args:
        confidence: float [B,H,W], largest probability.
        valid: bool [B,H,W].
        threshold: in 0..1.
        world: ranks whose pixels count.
    """
    sure = valid & (confidence >= threshold)
    return world.sum(sure.sum()).float() / (world.size * mean_count(valid, world))


def confident_labels(logits: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Hard pseudo-labels: argmax where its probability is >= threshold, else 255: int64 [B,H,W], no gradient.

    Args:
        logits: float [B,C,H,W].
        valid: bool [B,H,W]; elsewhere the label is 255.
        threshold: in 0..1; 0 keeps every valid pixel.
    """
    logits = logits.detach().float()
    best = logits.max(1)
    sure = (best.values - logits.logsumexp(1)).exp() >= threshold  # without a [B,C,H,W] of probabilities
    return best.indices.masked_fill(~(sure & valid), IGNORE)
