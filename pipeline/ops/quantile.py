"""Exact quantiles over the pixels of all ranks, without a sort and without a host sync."""

import torch
from torch import Tensor

from pipeline.ops.kernel import kernel
from pipeline.ops.world import World

_LOW = 16
_HIGH_BINS = 1 << 15
_LOW_BINS = 1 << _LOW


def masked_quantile(values: Tensor, mask: Tensor, q: Tensor, world: World) -> Tensor:
    """Quantiles of the masked values of all ranks, linearly interpolated as numpy does.

    A non-negative float orders like its bit pattern: one histogram of the high bits finds the bin of an order
    statistic, a second one of the low bits its exact value. Histograms add up over ranks.

    Args:
        values: float32 of any shape, >= 0; NaN is left out.
        mask: bool of that shape; False is left out.
        q: float [K] in 0..1.
        world: ranks whose values count.

    Returns:
        float32 [K]; NaN where no value is masked in, which every comparison answers with False.
    """
    flat = values.detach().float().abs().flatten()  # abs: -0.0 becomes 0.0
    member = mask.flatten() & (flat == flat)
    cumulative = world.sum(_high_histogram(flat, member)).cumsum(0)
    count = cumulative[-1]
    position = q.double() * (count - 1).clamp_min(0)
    ranks = torch.cat([position.floor(), position.ceil()]).long()
    bins = torch.searchsorted(cumulative, ranks, right=True).clamp_max(_HIGH_BINS - 1)
    inside = ranks - torch.where(bins > 0, cumulative[(bins - 1).clamp_min(0)], 0)
    within = world.sum(_low_histograms(flat, member, bins)).cumsum(1)
    low = torch.searchsorted(within, inside[:, None], right=True).clamp_max(_LOW_BINS - 1)[:, 0]
    below, above = ((bins << _LOW) | low).int().view(torch.float32).chunk(2)
    result = below + (position - position.floor()).float() * (above - below)
    return torch.where(count > 0, result, torch.nan)


@kernel()
def _high_histogram(values: Tensor, member: Tensor) -> Tensor:
    """Values by their high bits: int32 [2^15]."""
    counts = torch.zeros(_HIGH_BINS, dtype=torch.int32, device=values.device)
    return counts.index_add(0, values.view(torch.int32) >> _LOW, member.int())


@kernel()
def _low_histograms(values: Tensor, member: Tensor, bins: Tensor) -> Tensor:
    """Values by their low bits, among those with the high bits `bins` [K]: int32 [K,2^16]."""
    bits = values.view(torch.int32)
    high, low = bits >> _LOW, bits & (_LOW_BINS - 1)
    counts = torch.zeros(_LOW_BINS, dtype=torch.int32, device=values.device)
    # all values add to the bin of their low bits, most of them 0: one bin for the rest would be contended on a GPU
    rows = [counts.index_add(0, low, (member & (high == bins[k])).int()) for k in range(len(bins))]
    return torch.stack(rows)
