"""Class-wise memory banks of negative keys: one flat ring buffer for all classes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops.selection import draw_rank
from pipeline.ops.world import World


class MemoryBank(nn.Module):
    """FIFO queues of L2-normalised keys, one per class; the same on every rank.

    State (buffers, so checkpoints hold it): `keys` float [sum of sizes + 1, D] whose last row takes what is thrown
    away, `pointer` and `count` int64 [C].
    """

    keys: Tensor
    pointer: Tensor
    count: Tensor
    size: Tensor
    offset: Tensor

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        """Args: sizes: capacity of each class's queue, in keys; dim: channels of a key."""
        super().__init__()
        size = torch.tensor(sizes)
        self.register_buffer("keys", torch.zeros(int(size.sum()) + 1, dim))
        self.register_buffer("pointer", torch.zeros_like(size))
        self.register_buffer("count", torch.zeros_like(size))
        self.register_buffer("size", size, persistent=False)
        self.register_buffer("offset", size.cumsum(0) - size, persistent=False)

    @torch.no_grad()
    def push(self, keys: Tensor, valid: Tensor, world: World) -> None:
        """Appends the keys of all ranks in rank order; the newest stay.

        Args:
            keys: float [C,K,D], not normalised.
            valid: bool [C,K]; valid keys come first in each row.
            world: ranks to gather from: two collectives, whatever the number of classes.
        """
        gathered = world.gather(F.normalize(keys.float(), dim=-1))  # [W,C,K,D]
        counts = world.gather(valid.sum(1))  # [W,C]
        before = counts.cumsum(0) - counts
        total = counts.sum(0)
        k = torch.arange(keys.shape[1], device=keys.device)
        position = before[..., None] + k  # [W,C,K], place in this step's list
        kept = (k < counts[..., None]) & (position >= (total - self.size)[:, None])
        slot = self.offset[:, None] + (self.pointer[:, None] + position) % self.size[:, None]
        slot = torch.where(kept, slot, len(self.keys) - 1)
        self.keys.index_copy_(0, slot.flatten(), gathered.flatten(0, 2).to(self.keys.dtype))
        self.pointer.copy_((self.pointer + total) % self.size)
        self.count.copy_(torch.minimum(self.count + total, self.size))

    def draw(self, uniform: Tensor) -> Tensor:
        """Rows of `keys` drawn uniformly with replacement per class.

        Args:
            uniform: float [C,...] in [0,1).

        Returns:
            int64 of that shape; an empty class gives its first slot, which the caller masks by `count`.
        """
        shape = (-1, *[1] * (uniform.dim() - 1))
        return self.row(draw_rank(uniform, self.count.view(shape)))

    def row(self, rank: Tensor) -> Tensor:
        """Index into `keys` of the `rank`-th oldest key of each class, int64 [C,...] -> int64 [C,...]."""
        shape = (-1, *[1] * (rank.dim() - 1))
        start = torch.where(self.count == self.size, self.pointer, 0)
        return self.offset.view(shape) + (start.view(shape) + rank) % self.size.view(shape)

    def ordered(self, label: int) -> Tensor:
        """The keys of one class, oldest first: float [count, D]."""
        ranks = torch.arange(int(self.count[label]), device=self.keys.device)
        start = int(self.pointer[label]) if self.count[label] == self.size[label] else 0
        return self.keys[self.offset[label] + (start + ranks) % self.size[label]]
