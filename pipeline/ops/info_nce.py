"""InfoNCE and its binary relative over anchors and drawn negatives: loss and gradient in one pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.kernel import is_active, kernel


def info_nce(
    anchors: Tensor, positives: Tensor, keys: Tensor, index: Tensor, temperature: float, *, binary: bool = False
) -> Tensor:
    """Mean loss over the anchors of each class, float32 [C].

    With s = cosine / temperature, to the positive and to the N negatives of an anchor:
    -log(exp(s+) / (exp(s+) + sum exp(s-))), the paper's eq. 3; or, binary, softplus(-s+) + mean softplus(s-), which
    the paper's L_b is taken to mean (it is called in the release and defined nowhere).

    Args:
        anchors: float [C,M,D], get the gradient; compared by cosine.
        positives: float [C,D], one per class.
        keys: float [rows,D], normalised bank.
        index: int64 [C,M,N], rows of `keys`: the negatives of each anchor. Anchors may share them, which is faster
            as caches hold them, leaves the expected loss and gradient alone, and makes them noisier.
        temperature: tau.
        binary: which of the two.
    """
    return _InfoNCE.apply(  # type: ignore[no-any-return]
        anchors.float(), positives.float(), keys, index, temperature, binary
    )


_SHORT = 1e-8
"""Length below which a vector counts as 0."""


class _InfoNCE(torch.autograd.Function):
    """Keeps the gradient [C,M,D] for the backward, and nothing of the size of the negatives."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, positives: Tensor, keys: Tensor, index: Tensor, temperature: float, binary: bool
    ) -> Tensor:
        unit, norm, positive = _normalised(anchors, positives)
        losses, slope_own, slope_others = _loss(
            (unit * positive).sum(-1), _dots(unit, keys, index), temperature, binary
        )
        pull = slope_own[..., None] * positive + _combined(slope_others, keys, index)
        ctx.save_for_backward(_tangent(pull, unit, norm))
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].view(-1, 1, 1), None, None, None, None, None


@kernel()
def _normalised(anchors: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit anchors [C,M,D], their lengths [C,M,1], unit positives [C,1,D]."""
    norm = anchors.norm(dim=-1, keepdim=True).clamp_min(_SHORT)
    return anchors / norm, norm, F.normalize(positives, dim=-1)[:, None]


@kernel()
def _loss(own: Tensor, others: Tensor, temperature: float, binary: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [C], and its slope along each cosine: to the positive [C,M] and to the negatives [C,M,N]."""
    own, others = own / temperature, others / temperature
    share = 1.0 / (temperature * own.shape[1])
    if binary:
        losses = F.softplus(-own) + F.softplus(others).mean(-1)
        return losses.mean(1), (own.sigmoid() - 1) * share, others.sigmoid() * (share / others.shape[2])
    largest = torch.maximum(own, others.amax(-1))
    first, rest = (own - largest).exp(), (others - largest[..., None]).exp()
    total = first + rest.sum(-1)
    losses = largest + total.log() - own
    return losses.mean(1), (first / total - 1) * share, rest * (share / total)[..., None]


@kernel()
def _tangent(pull: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """The gradient of a cosine has no part along the anchor; an anchor of length 0 has no direction and gets none."""
    return torch.where(norm > _SHORT, (pull - unit * (pull * unit).sum(-1, keepdim=True)) / norm, 0.0)


def _dots(unit: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """Cosines of anchors and negatives: [C,M,D], [rows,D], [C,M,N] -> float32 [C,M,N]."""
    if is_active():
        return _gathered_dots(unit, keys, index)
    classes = zip(unit, index, strict=True)  # one class at a time: all negatives at once are [C,M,N,D]
    return torch.stack([torch.bmm(keys[rows].float(), a.unsqueeze(2)).squeeze(2) for a, rows in classes])


@kernel()
def _gathered_dots(unit: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """As `_dots`, each negative read where it lies."""
    return (unit[:, :, None] * keys[index]).sum(-1)


def _combined(weights: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """Weighted sums of each anchor's negatives: [C,M,N], [rows,D], [C,M,N] -> float32 [C,M,D]."""
    weights = weights.flatten(0, 1).to(keys.dtype)
    bags = F.embedding_bag(index.flatten(0, 1), keys, mode="sum", per_sample_weights=weights)
    return bags.float().unflatten(0, index.shape[:2])
