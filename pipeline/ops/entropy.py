"""The teacher's per-pixel entropy and the partition it makes: reliable, unreliable, ignored."""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.ops.losses import IGNORE
from pipeline.ops.quantile import masked_quantile
from pipeline.ops.world import World


class Partition(NamedTuple):
    """Pixels of the unlabeled images by the teacher's entropy; bool [B,H,W] and 0-dim float32."""

    reliable: Tensor
    """Entropy below gamma_t: pseudo-label and anchors."""
    unreliable: Tensor
    """Entropy at or above the (1 - alpha_t) quantile: negative samples."""
    threshold: Tensor
    """gamma_t; NaN if every pixel is ignored (then both sets are empty)."""


def entropy(logits: Tensor) -> Tensor:
    """-sum_c p_c ln p_c of the softmax over dim 1, float32 [B,H,W], in one pass over the logits.

    Args:
        logits: float [B,C,H,W].
    """
    shifted = logits.float() - logits.float().amax(1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(1)
    return (total.log() - (weights * shifted).sum(1) / total).clamp_min(0.0)


def partition(values: Tensor, label: Tensor, alpha: Tensor, world: World) -> Partition:
    """Parts the pixels at gamma_t, the (1 - alpha_t) quantile of the entropy over all ranks (paper eq. 2 and 8).

    Reliable and unreliable share one threshold: the release drops and selects by two percentiles that coincide at its
    defaults.

    Args:
        values: float32 [B,H,W], entropy.
        label: int64 [B,H,W], pseudo-label before dropping; 255 takes no part.
        alpha: float 0-dim, unreliable share alpha_t in 0..1.
        world: ranks whose pixels share the threshold.
    """
    known = label != IGNORE
    threshold = masked_quantile(values, known, (1.0 - alpha).reshape(1), world)[0]
    return Partition(known & (values < threshold), known & (values >= threshold), threshold)


def shrink(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour reduction to `size`: source index floor(i*H/h) on both axes, any dtype, [B,H,W] -> [B,h,w]."""
    rows, columns = (
        torch.arange(small, device=values.device) * large // small
        for large, small in zip(values.shape[-2:], size, strict=True)
    )
    return values[:, rows][:, :, columns]
