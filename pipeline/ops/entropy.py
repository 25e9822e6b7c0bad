"""The teacher's per-pixel entropy and the partition it makes: reliable, unreliable, ignored."""

from typing import NamedTuple

from torch import Tensor

from pipeline.ops.kernel import kernel
from pipeline.ops.quantile import masked_quantile
from pipeline.ops.world import World

IGNORE = 255
"""The label of pixels that take no part."""


class Partition(NamedTuple):
    """Pixels of the unlabeled images by the teacher's entropy; bool of its shape."""

    reliable: Tensor
    """Entropy below gamma_t: pseudo-label and anchors."""
    unreliable: Tensor
    """Entropy at or above gamma_t: negative samples."""


def entropy(logits: Tensor) -> Tensor:
    """-sum_c p_c ln p_c of the softmax over dim 1, float32 [B,H,W], in one pass over the logits.

    Args:
        logits: float [B,C,H,W].
    """
    shifted = logits.float() - logits.float().amax(1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(1)
    return (total.log() - (weights * shifted).sum(1) / total).clamp_min(0.0)


def threshold(values: Tensor, known: Tensor, alpha: Tensor, world: World) -> Tensor:
    """gamma_t, the (1 - alpha_t) quantile of the entropy over all ranks (paper eq. 8): float32 0-dim.

    Reliable and unreliable share it: the release drops and selects by two percentiles that coincide at its defaults.

    Args:
        values: float32, entropy, of any shape.
        known: bool of that shape; False (no pseudo-label, or no pixel) takes no part.
        alpha: float 0-dim, unreliable share alpha_t in 0..1.
        world: ranks whose pixels share the threshold.
    """
    return masked_quantile(values, known, (1.0 - alpha).reshape(1), world)[0]


def surest_threshold(values: Tensor, known: Tensor, alpha: Tensor, world: World) -> Tensor:
    """The alpha_t quantile of the entropy, float32 0-dim: pixels up to it are the surest alpha_t share.

    They are the "reliable" negatives of the paper's ablation (tables 4 and A2), as many as there are unreliable ones,
    and what the release calls reliable in L_c. Arguments as for `threshold`.
    """
    return masked_quantile(values, known, alpha.reshape(1), world)[0]


def partition(values: Tensor, known: Tensor, gamma: Tensor) -> Partition:
    """Parts the known pixels at gamma_t (paper eq. 2); without any, gamma is NaN and both sets are empty."""
    return Partition(known & (values < gamma), known & (values >= gamma))


@kernel()
def reliable_labels(values: Tensor, label: Tensor, gamma: Tensor) -> Tensor:
    """Labels of the pixels below gamma_t, 255 elsewhere: of the shape and dtype of `label`."""
    reliable = (values < gamma).to(label.dtype)
    return label * reliable + IGNORE * (1 - reliable)
