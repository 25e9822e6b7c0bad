"""Pixels for the contrastive loss, and its sets and sums in a form that is slow and quick to check."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.methods.u2pl.reference import Draws, Pixels, Reliability

C, D, H, W = 5, 4, 6, 7


def scene(classes: int = C, seed: int = 0, labels: tuple[int, ...] | None = None) -> Pixels:
    """Three images, the first one labeled; labels hold 255; pixels that may be anchors or negatives have one."""
    torch.manual_seed(seed)
    choice = torch.tensor([*(labels or range(classes)), 255])
    label = choice[torch.randint(0, len(choice), (3, H, W))]
    known, side = label != 255, torch.rand(3, H, W)
    may_be_anchor = known & (side < 0.7)
    may_be_anchor[0] = known[0]
    return Pixels(
        student=torch.randn(3, D, H, W, requires_grad=True),
        teacher=torch.randn(3, D, H, W),
        logits=torch.randn(3, classes, H, W) * 2,
        label=label,
        may_be_anchor=may_be_anchor,
        may_be_negative=known & (side >= 0.6),
        labeled=1,
    )


def places(maps: Tensor) -> list[list[int]]:
    """b, y, x of every pixel of [B,...,h,w], in order."""
    return torch.cartesian_prod(*map(torch.arange, (len(maps), *maps.shape[-2:]))).tolist()


def drawn(mask: Tensor, uniform: Tensor) -> list[int]:
    """The members of a set [n] that `uniform` [K] picks, with replacement; none of an empty set."""
    inside = mask.nonzero().flatten()
    return [int(inside[min(int(u * len(inside)), len(inside) - 1)]) for u in uniform if len(inside)]


def info_nce(anchors: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Eq. 3 by autograd, for one class: [M,D], [D], [M,N,D] -> mean over the anchors."""
    candidates = torch.cat([positive.expand(len(anchors), 1, -1), negatives], 1)
    logits = F.cosine_similarity(anchors[:, None], candidates, dim=-1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(anchors), dtype=torch.long))


def binary(anchors: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """L_b by autograd; arguments as for `info_nce`."""
    own = F.cosine_similarity(anchors, positive[None], dim=-1) / temperature
    others = F.cosine_similarity(anchors[:, None], negatives, dim=-1) / temperature
    return -(own.sigmoid().log() + (1 - others.sigmoid()).log().mean(-1)).mean()


def split(values: Tensor, known: Tensor, thresholds: Tensor) -> Reliability:
    """Pixels of known entropies, parted at quantiles."""
    zero = torch.zeros(())
    return Reliability(zero, thresholds, zero, torch.zeros_like(known, dtype=torch.int64), values, known)


def draws_of(classes: int = C, anchors: int = 6, keys: int = 8, groups: int | None = None) -> Draws:
    """Random numbers of a step; every anchor has negatives of its own unless there are fewer groups."""
    return Draws(torch.rand(classes, anchors), torch.rand(classes, keys), torch.rand(classes, groups or anchors, 5))
