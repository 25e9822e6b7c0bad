"""The entropy of a network's predictions, pixel by pixel, and its quantiles: of one tensor, and over all ranks."""

import math

import torch
from torch import Tensor

from pipeline.ops.kernel import kernel
from pipeline.ops.world import World

IGNORE = 255
"""Label of pixels that are ignored; that of prepared masks (`datasets.prepared.dataset.IGNORE_INDEX`)."""


def entropy(logits: Tensor) -> Tensor:
    """-sum_c p_c ln p_c of the softmax over dim 1, float32 [B,H,W], in one pass over the logits.

    Args:
        logits: float [B,C,H,W].
    """
    shifted = logits.float() - logits.float().amax(1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(1)
    return (total.log() - (weights * shifted).sum(1) / total).clamp_min(0.0)


def relative_entropy(logits: Tensor) -> Tensor:
    """The entropy of each pixel of an image in units of log C: float32 [H,W] of logits [C,H,W], 0..1."""
    return (entropy(logits[None])[0] / math.log(len(logits))).clamp(0, 1)


def quantile(values: Tensor, share: Tensor) -> Tensor:
    """The quantile of float32 [n], 0-dim, linearly interpolated; NaN of no values. `torch.quantile` stops at 2^24.

    Args:
        values: float32 [n].
        share: float, 0-dim, in 0..1.
    """
    if not len(values):
        return values.new_full((), torch.nan)
    ordered, place = values.sort().values.double(), share.double() * (len(values) - 1)
    below, above = ordered[place.floor().long()], ordered[place.ceil().long()]
    return torch.lerp(below, above, place - place.floor()).float()


# ---- exact quantiles over all ranks, without a sort and without a host sync -------------------------------------


_LOW = 16
_HIGH_BINS = 1 << 15
_LOW_BINS = 1 << _LOW


def masked_quantile(values: Tensor, mask: Tensor, q: Tensor, world: World) -> Tensor:
    """Quantiles of the masked values of all ranks, linearly interpolated as numpy does.

    A non-negative float orders like its bit pattern: one histogram of the high bits finds the bin of an order
    statistic, a second one of the low bits its exact value. Histograms add up over ranks.

    Args:
        values: float32 of any shape, >= 0; NaN is left out.
        mask: bool of that shape, True where a value counts.
        q: float [K] in 0..1.
        world: ranks whose values count.

    Returns:
        float32 [K]; NaN if no value counts, with which every comparison is False.
    """
    flat, member = values.detach().float().flatten(), mask.flatten()
    cumulative = world.sum(_high_histogram(flat, member)).cumsum(0)
    count = cumulative[-1]
    position = q.double() * (count - 1).clamp_min(0)
    ranks = torch.stack([position.floor(), position.ceil()], 1).long()  # [K,2]
    bins = torch.searchsorted(cumulative, ranks, right=True).clamp_max(_HIGH_BINS - 1)
    inside = ranks - torch.where(bins > 0, cumulative[(bins - 1).clamp_min(0)], 0)
    within = world.sum(_low_histograms(flat, member, bins)).cumsum(2)
    low = torch.searchsorted(within, inside[..., None], right=True).clamp_max(_LOW_BINS - 1)[..., 0]
    below, above = ((bins << _LOW) | low).int().view(torch.float32).unbind(1)
    result = torch.where(above > below, below + (position - position.floor()).float() * (above - below), below)
    return torch.where(count > 0, result, torch.nan)


def _ordered_bits(values: Tensor) -> Tensor:
    """Bits that order as the values do, int32; abs makes -0.0 the 0.0 that it equals."""
    return values.abs().view(torch.int32)


@kernel()
def _high_histogram(values: Tensor, mask: Tensor) -> Tensor:
    """Number of values that count, by their high bits: int32 [2^15]."""
    counts = torch.zeros(_HIGH_BINS, dtype=torch.int32, device=values.device)
    return counts.index_add(0, _ordered_bits(values) >> _LOW, (mask & (values == values)).int())


@kernel()
def _low_histograms(values: Tensor, mask: Tensor, bins: Tensor) -> Tensor:
    """Number of values that count and whose high bits are `bins` [K,2], by their low bits: int32 [K,2,2^16].

    The two bins of a row share one pass. All values add to a bin, most of them 0: one bin for the rest would be
    contended on a GPU.
    """
    bits = _ordered_bits(values)
    high, low = bits >> _LOW, bits & (_LOW_BINS - 1)
    member = mask & (values == values)
    rows = []
    for k in range(len(bins)):
        first, second = high == bins[k, 0], high == bins[k, 1]
        counts = torch.zeros(2 * _LOW_BINS, dtype=torch.int32, device=values.device)
        counts = counts.index_add(0, low + second.int() * _LOW_BINS, (member & (first | second)).int())
        halves = counts.view(2, _LOW_BINS)
        rows.append(torch.where(bins[k, 0] == bins[k, 1], halves[1:], halves))
    return torch.stack(rows)
