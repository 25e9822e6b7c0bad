"""Exact quantiles over the pixels of all ranks, without a sort over ranks and without a host sync."""

import torch
from torch import Tensor

from pipeline.ops.world import World

_LOW = 16
_HIGH_BINS = 1 << 15
_LOW_BINS = 1 << _LOW


def masked_quantile(values: Tensor, mask: Tensor, q: Tensor, world: World) -> Tensor:
    """Quantiles of the masked values of all ranks, linearly interpolated as numpy does.

    A non-negative float orders like its bit pattern: one histogram of the high bits finds the bin of an order
    statistic, a second one of the low bits its exact value. Histograms add up over ranks.

    Args:
        values: float32 of any shape, >= 0.
        mask: bool of that shape; False is left out.
        q: float [K] in 0..1.
        world: ranks whose values count.

    Returns:
        float32 [K]; NaN where no value is masked in, which every comparison answers with False.
    """
    if world.size == 1 and values.numel() <= 1 << 24:  # what torch.nanquantile can take
        return torch.nanquantile(values.detach().masked_fill(~mask, torch.nan).flatten(), q)
    bits = values.detach().float().abs().contiguous().view(torch.int32).flatten().long()  # abs: -0.0 becomes 0.0
    weight = mask.flatten().to(torch.int64)
    high, low = bits >> _LOW, bits & (_LOW_BINS - 1)
    cumulative = world.sum(
        torch.zeros(_HIGH_BINS, dtype=torch.int64, device=bits.device).index_add_(0, high, weight)
    ).cumsum(0)
    count = cumulative[-1]
    position = q.double() * (count - 1).clamp_min(0)
    ranks = torch.cat([position.floor(), position.ceil()]).long()
    bins = torch.searchsorted(cumulative, ranks, right=True).clamp_max(_HIGH_BINS - 1)
    inside = ranks - torch.where(bins > 0, cumulative[(bins - 1).clamp_min(0)], 0)
    histogram = torch.zeros(len(ranks), _LOW_BINS, dtype=torch.int64, device=bits.device)
    for row, chosen in zip(histogram, bins, strict=True):
        row.index_add_(0, low, weight * (high == chosen))
    low_bin = torch.searchsorted(world.sum(histogram).cumsum(1), inside[:, None], right=True).clamp_max(_LOW_BINS - 1)[
        :, 0
    ]
    below, above = ((bins << _LOW) | low_bin).to(torch.int32).view(torch.float32).chunk(2)
    result = below + (position - position.floor()).float() * (above - below)
    return torch.where(count > 0, result, torch.nan)
