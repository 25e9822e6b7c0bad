"""The teacher's per-pixel entropy and the partition it makes: reliable, unreliable, ignored."""

from typing import NamedTuple

from torch import Tensor

from pipeline.ops.quantile import masked_quantile
from pipeline.ops.world import World

IGNORE = 255
"""The label of pixels that take no part."""


class Partition(NamedTuple):
    """Pixels of the unlabeled images by the teacher's entropy; bool of the shape of the entropy, and 0-dim float32."""

    reliable: Tensor
    """Entropy below gamma_t: pseudo-label and anchors."""
    unreliable: Tensor
    """Entropy at or above gamma_t: negative samples."""
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


def partition(values: Tensor, known: Tensor, alpha: Tensor, world: World) -> Partition:
    """Parts the pixels at gamma_t, the (1 - alpha_t) quantile of the entropy over all ranks (paper eq. 2 and 8).

    Reliable and unreliable share one threshold: the release drops and selects by two percentiles that coincide at its
    defaults.

    Args:
        values: float32, entropy, of any shape.
        known: bool of that shape; False (no pseudo-label, or no pixel) takes no part.
        alpha: float 0-dim, unreliable share alpha_t in 0..1.
        world: ranks whose pixels share the threshold.
    """
    threshold = masked_quantile(values, known, (1.0 - alpha).reshape(1), world)[0]
    return Partition(known & (values < threshold), known & (values >= threshold), threshold)
