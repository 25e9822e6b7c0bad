"""Drawing members of many sets at once, with fixed shapes and without a host sync."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.kernel import kernel

_BLOCK = 128
"""Number of pixels in a block: a lookup searches the counts of the blocks, then one block."""
_CHUNK = 512
"""Largest number of rows that one bag sums: many bags keep a GPU busy."""


class Members:
    """Sets of pixels that may overlap, one per class, from which the r-th member can be looked up.

    Attributes:
        count: int64 [C], size of each set.
    """

    def __init__(self, mask: Tensor) -> None:
        """Args: mask: bool or uint8 [C,n], 1 where pixel j belongs to set c; members are ordered by j."""
        self._last = mask.shape[1] - 1
        self._blocks = F.pad(mask, (0, -mask.shape[1] % _BLOCK)).view(torch.uint8).unflatten(1, (-1, _BLOCK))
        self._ends = self._blocks.sum(2, dtype=torch.int32).cumsum(1, dtype=torch.int32)
        self.count = self._ends[:, -1].long()

    def lookup(self, rank: Tensor) -> Tensor:
        """Pixel index of the `rank`-th member (from 0): int64 [C,K] -> int64 [C,K]; any index if there is none."""
        block = torch.searchsorted(self._ends, (rank + 1).int()).clamp_max(self._ends.shape[1] - 1)
        before = torch.where(block > 0, self._ends.gather(1, (block - 1).clamp_min(0)), 0)
        classes = torch.arange(len(rank), device=rank.device)[:, None]
        place = _place(self._blocks[classes, block], rank - before)
        return (block * _BLOCK + place).clamp_max(self._last)

    def draw(self, uniform: Tensor) -> Tensor:
        """Members drawn uniformly with replacement by `uniform` in [0,1), float [C,K] -> pixel index int64 [C,K]."""
        return self.lookup(draw_rank(uniform, self.count[:, None]))

    def stratified(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Up to K distinct members: all of them in order, or one from each of K equal strata.

        Args:
            uniform: float [C,K] in [0,1).

        Returns:
            pixel index int64 [C,K], and bool [C,K]: False beyond the size of the set.
        """
        strata = uniform.shape[1]
        k = torch.arange(strata + 1, device=uniform.device)
        count = self.count[:, None]
        bounds = k * count // strata  # whole numbers: with fractions, neighbours could draw the same member
        spread = bounds[:, :-1] + draw_rank(uniform, bounds[:, 1:] - bounds[:, :-1])
        return self.lookup(torch.where(count <= strata, k[:-1], spread)), k[:-1] < count


@kernel()
def _place(blocks: Tensor, rank: Tensor) -> Tensor:
    """Index of the `rank`-th set byte of each block: uint8 [C,K,128], int64 [C,K] -> int64 [C,K]."""
    return (blocks.cumsum(2, dtype=torch.int32) <= rank[..., None]).sum(2)


class Segments:
    """Disjoint sets of pixels, sorted once: members, counts and sums of all sets come from contiguous segments.

    Attributes:
        count: int64 [S], size of each set.
    """

    def __init__(self, number: Tensor, sets: int) -> None:
        """Args: number: int16 [n], the set of each pixel in 0..sets-1, or `sets`: in none; sets: S."""
        ordered, self._order = number.sort(stable=True)
        wanted = torch.arange(sets + 1, device=number.device, dtype=number.dtype)
        self._starts = torch.searchsorted(ordered, wanted)
        self.count = self._starts.diff()

    def draw(self, uniform: Tensor) -> Tensor:
        """Members drawn uniformly with replacement by `uniform` in [0,1), float [S,K] -> pixel index int64 [S,K].

        Members of a set are ordered by pixel; an empty set gives any index in range.
        """
        place = self._starts[:-1, None] + draw_rank(uniform, self.count[:, None])
        return self._order[place.clamp_max(len(self._order) - 1)]

    def sums(self, values: Tensor) -> Tensor:
        """Sum of the rows of each set's pixels: float [n,D] -> float32 [S,D]."""
        cuts = torch.arange(0, len(self._order), _CHUNK, device=values.device)
        offsets = torch.cat([cuts, self._starts]).sort().values
        bags = F.embedding_bag(self._order, values, offsets, mode="sum").float()
        owner = torch.searchsorted(self._starts, offsets, right=True) - 1
        total = bags.new_zeros(len(self._starts), values.shape[1])
        return total.index_add(0, owner, bags)[:-1]


def draw_rank(uniform: Tensor, count: Tensor) -> Tensor:
    """floor(u * count) in 0..count-1, and 0 for an empty set: int64, broadcast."""
    return torch.minimum((uniform * count).long(), (count - 1).clamp_min(0))


def rows(feature_map: Tensor) -> Tensor:
    """Feature vectors of all pixels: float [B,D,h,w] -> [B*h*w,D], at index b*h*w + y*w + x.

    No copy for a map in channels-last layout, where a vector is one piece of memory.
    """
    return feature_map.permute(0, 2, 3, 1).flatten(0, 2)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of float [n,D] at int64 index of any shape: [*index.shape,D]; the gradient adds up where a row repeats."""
    return values.index_select(0, index.flatten()).unflatten(0, index.shape)
