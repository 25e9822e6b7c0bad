"""A contrastive loss between two views of the same pixels, with negatives from other images."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.losses import mean_count
from pipeline.ops.selection import Members, rows, take
from pipeline.ops.world import World


class PairViews(NamedTuple):
    """Features of one side of the batch, seen twice."""

    strong: Tensor
    """float [B,D,h,w], gets the gradient."""
    weak: Tensor
    """float [B,D,h,w], held fixed: positives and negatives."""
    label: Tensor
    """int64 [B,h,w], predicted classes."""
    valid: Tensor
    """bool [B,h,w], cells that show an image."""


def pair_contrast(
    views: PairViews, anchors: Tensor, keys: Tensor, negatives: int, temperature: float, world: World
) -> Tensor:
    """-log of exp(z z'/tau) over exp(z z'/tau) + N mean_j exp(z z'_j/tau), as share of the mean over all anchors.

    z is a pixel of the strong view, z' the same pixel of the weak one, z'_j the drawn pixels of other images (of all
    ranks) with another predicted class: same-class pixels would be false negatives. The mean stands for a draw of
    exactly N, so the loss does not depend on how many of the drawn pixels qualify.

    Args:
        views: of this rank's images.
        anchors: float [B,M] in [0,1), which pixels are anchors.
        keys: float [B,K] in [0,1), which pixels may be negatives.
        negatives: N.
        temperature: tau.
        world: ranks whose pixels are negatives and that share the mean.
    """
    members = Members(views.valid.flatten(1))
    known = members.count > 0  # [B]
    area = views.valid[0].numel()
    offset = area * torch.arange(len(known), device=known.device)[:, None]
    anchor, key = members.draw(anchors) + offset, members.draw(keys) + offset  # [B,M], [B,K]
    label = views.label.flatten()
    z = F.normalize(take(rows(views.strong), anchor).float(), dim=-1).flatten(0, 1)  # [B*M,D]
    same = F.normalize(take(rows(views.weak.detach()), anchor).float(), dim=-1).flatten(0, 1)
    others = world.gather(F.normalize(take(rows(views.weak.detach()), key).float(), dim=-1)).flatten(0, 2)  # [W*B*K,D]
    other_label = world.gather(torch.where(known[:, None], label[key], -1)).flatten()  # -1: nothing there

    image = world.rank * len(known) + torch.arange(len(known), device=known.device)
    owner = torch.arange(len(others), device=known.device) // keys.shape[1]
    apart = owner != image.repeat_interleave(anchors.shape[1])[:, None]
    fits = apart & (other_label >= 0) & (other_label != label[anchor].view(-1, 1))  # [B*M,W*B*K]
    count = fits.sum(1)
    positive = (z * same).sum(1) / temperature
    total = (z @ others.t() / temperature).masked_fill(~fits, -1e9).logsumexp(1)
    mean = total - count.clamp_min(1).log() + math.log(negatives)
    losses = torch.logaddexp(positive, mean) - positive
    active = known.repeat_interleave(anchors.shape[1]) & (count > 0)
    return torch.where(active, losses, 0.0).sum() / mean_count(active, world)
