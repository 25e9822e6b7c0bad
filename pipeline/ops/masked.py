"""Means over pixels of which some do not count, by the three normalisers of the literature.

They differ by up to one over the kept share and are the commonest silent divergence between re-implementations:
`kept` divides by the pixels that carry the loss, `valid` by all that show an image, `all` by every pixel. As in
`ops.losses`, each result is this rank's share of the mean over all ranks.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.entropy import IGNORE
from pipeline.ops.losses import mean_count
from pipeline.ops.world import World

Normaliser = Literal["kept", "valid", "all"]


def pixel_count(kept: Tensor, valid: Tensor, over: Normaliser, world: World) -> Tensor:
    """What a sum over pixels is divided by: float32, 0-dim, the mean over the ranks and at least 1.

    Args:
        kept: bool [B,H,W], pixels that carry the loss.
        valid: bool [B,H,W], pixels that show an image.
        over: which of them are counted.
        world: ranks that share the mean; each has B images.
    """
    if over == "all":
        return torch.full((), float(kept.numel()), device=kept.device)
    return mean_count(kept if over == "kept" else valid, world)


def masked_cross_entropy(logits: Tensor, target: Tensor, valid: Tensor, world: World, over: Normaliser) -> Tensor:
    """Mean cross entropy, 0-dim float32; 0 with a graph where nothing is kept.

    Args:
        logits: float [B,C,H,W].
        target: int64 [B,H,W]; 255 is not kept.
        valid: bool [B,H,W], pixels that show an image.
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
    """sum_i w_i CE_i / sum_i w_i, 0 if all weights are.

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
        valid: bool [B,H,W]: kept and valid are the same here.
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
