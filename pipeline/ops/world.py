"""The group of ranks that a step runs in; every collective a method needs goes through it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.14


@dataclass(frozen=True)
class World:
    """Rank and size of the process group; all operations are no-ops at size 1 and carry no gradient."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> "World":
        """The running process group, or the world of one."""
        if dist.is_available() and dist.is_initialized():
            return World(dist.get_rank(), dist.get_world_size())
        return World()

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over the ranks; same shape and dtype, detached."""
        value = value.detach()
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: Tensor) -> Tensor:
        """`value` of every rank: [size, *shape], in rank order, detached."""
        value = value.detach().contiguous()
        if self.size == 1:
            return value.unsqueeze(0)
        out = torch.empty((self.size * value.shape[0], *value.shape[1:]), dtype=value.dtype, device=value.device)
        _all_gather(out, value)
        return out.view(self.size, *value.shape)
