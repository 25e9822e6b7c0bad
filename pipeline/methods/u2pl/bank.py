"""Class-wise memory banks of negative keys: one flat ring buffer for all classes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.ops.kernel import kernel
from pipeline.ops.selection import draw_rank
from pipeline.ops.world import World


class MemoryBank(nn.Module):
    """FIFO queues of L2-normalised keys, one per class; the same on every worker.

    State (buffers, so checkpoints hold it): `keys` float [sum of sizes + 1, D] whose last row takes what is thrown
    away, `pointer` and `count` int64 [C].
    """

    keys: Tensor
    pointer: Tensor
    count: Tensor
    size: Tensor
    offset: Tensor

    def __init__(self, sizes: Sequence[int], dim: int, dtype: torch.dtype = torch.float32) -> None:
        """Args: sizes: capacity of each class's queue, in keys; dim: channels of a key; dtype: of the stored keys."""
        super().__init__()
        size = torch.tensor(sizes)
        self.register_buffer("keys", torch.zeros(sum(sizes) + 1, dim, dtype=dtype))
        self.register_buffer("pointer", torch.zeros_like(size))
        self.register_buffer("count", torch.zeros_like(size))
        self.register_buffer("size", size, persistent=False)
        self.register_buffer("offset", size.cumsum(0) - size, persistent=False)

    @torch.no_grad()
    def push(self, keys: Tensor, valid: Tensor, world: World) -> None:
        """Appends the keys of all workers, in their order; the newest stay.

        Args:
            keys: float [C,K,D], not normalised. A key that is not finite is left out: one would spoil the loss of
                its class for as long as it stays.
            valid: bool [C,K], which of them exist.
            world: workers to gather from: two collectives, whatever the number of classes.
        """
        unit, finite = _unit(keys)
        given = world.gather(valid & finite)  # [W,C,K]
        gathered = world.gather(unit.to(self.keys.dtype))  # [W,C,K,D]
        place, total = _places(given)
        stays = given & (place >= (total - self.size)[:, None])
        slot = self.offset[:, None] + (self.pointer[:, None] + place) % self.size[:, None]
        slot = torch.where(stays, slot, len(self.keys) - 1)
        self.keys.index_copy_(0, slot.flatten(), gathered.flatten(0, 2))
        self.pointer.copy_((self.pointer + total) % self.size)
        self.count.copy_(torch.minimum(self.count + total, self.size))

    def held(self) -> list[Tensor]:
        """The keys of each class, in no order: views of `keys`, float [count,D]."""
        places = zip(self.offset.tolist(), self.count.tolist(), strict=True)
        return [self.keys[first : first + count] for first, count in places]

    def draw(self, uniform: Tensor) -> Tensor:
        """Rows of `keys` drawn uniformly with replacement per class.

        Args:
            uniform: float [C,...] in [0,1).

        Returns:
            int64 of that shape; an empty class gives its first slot, which the caller masks by `count`.
        """
        return _draw(uniform, self.count, self.pointer, self.size, self.offset)


@kernel()
def _unit(keys: Tensor) -> tuple[Tensor, Tensor]:
    """L2-normalised float32 [C,K,D], 0 where not finite; and whether they are finite, bool [C,K]."""
    length = keys.float().norm(dim=-1, keepdim=True)
    finite = length.isfinite()
    return torch.where(finite, keys.float() / length.clamp_min(1e-12), 0.0), finite.squeeze(-1)


def _places(given: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each given key in its class's list of this step, bool [W,C,K] -> int64; and the lists' lengths [C]."""
    counts = given.sum(2)
    before = counts.cumsum(0) - counts
    return before[..., None] + given.cumsum(2) - 1, counts.sum(0)


@kernel()
def _draw(uniform: Tensor, count: Tensor, pointer: Tensor, size: Tensor, offset: Tensor) -> Tensor:
    """Slots of the drawn keys. The oldest key lies at the pointer once a queue is full, at its start before."""
    shape = (-1, *[1] * (uniform.dim() - 1))
    rank = draw_rank(uniform, count.view(shape))
    start = torch.where(count == size, pointer, 0)
    return offset.view(shape) + (start.view(shape) + rank) % size.view(shape)
