"""Drawing members of many sets at once, with fixed shapes and without a host sync."""

import torch
from torch import Tensor


class Members:
    """Sets of pixels, one per class, from which the r-th member can be looked up.

    Attributes:
        count: int64 [C], size of each set.
    """

    def __init__(self, mask: Tensor) -> None:
        """Args: mask: bool [C,n], True where pixel j belongs to set c; members are ordered by j."""
        self._cumulative = mask.cumsum(1, dtype=torch.int32)
        self.count = self._cumulative[:, -1].long()

    def lookup(self, rank: Tensor) -> Tensor:
        """Pixel index of the `rank`-th member: int64 [C,K] -> int64 [C,K]; any index in range if there is none."""
        index = torch.searchsorted(self._cumulative, (rank + 1).int())
        return index.clamp_max(self._cumulative.shape[1] - 1)

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


def draw_rank(uniform: Tensor, count: Tensor) -> Tensor:
    """floor(u * count) in 0..count-1, and 0 for an empty set: int64, broadcast."""
    return torch.minimum((uniform * count).long(), (count - 1).clamp_min(0))


def rows(feature_map: Tensor, index: Tensor) -> Tensor:
    """Feature vectors at flat pixel indices.

    Args:
        feature_map: float [B,D,h,w].
        index: int64 of any shape, b*h*w + y*w + x.

    Returns:
        float [*index.shape, D]; its gradient is one index_put into [B,D,h*w].
    """
    area = feature_map.shape[2] * feature_map.shape[3]
    return feature_map.flatten(2)[index // area, :, index % area]
