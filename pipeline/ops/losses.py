"""Cross entropies over pixels. Each is this rank's share of the mean over all ranks.

A share is the local sum divided by the mean count per rank: DDP's averaging of gradients then gives exactly the mean
over the global batch, whatever the number of ranks and wherever the ignored pixels lie. Only counts are reduced, never
a loss that is differentiated.
"""

import torch
from torch import Tensor

from pipeline.ops.entropy import IGNORE
from pipeline.ops.grid import FullGrid, Grid
from pipeline.ops.world import World


def mean_count(mask: Tensor, world: World) -> Tensor:
    """True entries per rank, averaged over the ranks and at least 1: float32, 0-dim."""
    return (world.sum(mask.sum()).float() / world.size).clamp_min(1.0)


def cross_entropy(logits: Tensor, target: Tensor, world: World, grid: Grid | None = None) -> Tensor:
    """Mean cross entropy over the pixels that are not ignored, 0 if there are none.

    Args:
        logits: float [B,C,H,W]; with a grid, at the network's resolution.
        target: int64 [B,H,W], 255 ignored; with a grid, in its order.
        world: ranks that share the mean.
        grid: how the logits lie below the pixels; None: they are of the same size.
    """
    total = (grid or FullGrid.of(target)).cross_entropy(logits, target)
    return total / mean_count(target != IGNORE, world)


def ohem_cross_entropy(
    logits: Tensor, target: Tensor, world: World, threshold: float = 0.7, min_kept: int = 100_000
) -> Tensor:
    """Cross entropy of the hard pixels: those whose true class has probability <= `threshold`.

    If fewer than `min_kept` are that hard, the `min_kept` hardest count; with fewer valid pixels, all (per rank).
    Logits and target are of the same size.
    """
    valid = target != IGNORE
    with torch.no_grad():
        picked = logits.float().softmax(1).gather(1, target.clamp_max(logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        ordered = picked.masked_fill(~valid, 2.0).flatten().sort().values  # ignored pixels last
        limit = ordered[min(min_kept, len(ordered)) - 1].clamp_min(threshold)
        kept = torch.where(valid.sum() < min_kept, valid, valid & (picked <= limit))
    return cross_entropy(logits, target.masked_fill(~kept, IGNORE), world)


def unsupervised_cross_entropy(
    logits: Tensor, pseudo_label: Tensor, shown: Tensor, world: World, grid: Grid | None = None
) -> Tensor:
    """L_u: mean cross entropy over the kept pixels, times shown pixels / kept pixels (the paper's lambda_u, eq. 3).

    The paper counts B x H x W, as the release labels padding, too; here padding is neither kept nor shown.

    Args:
        logits: as for `cross_entropy`.
        pseudo_label: as its target; dropped pixels are 255.
        shown: bool [B,H,W], pixels that show an image, in any order.
        world: ranks that share the mean.
        grid: as for `cross_entropy`.
    """
    grid = grid or FullGrid.of(pseudo_label)
    kept = mean_count(pseudo_label != IGNORE, world)
    return grid.cross_entropy(logits, pseudo_label) * mean_count(shown, world) / kept.square()
