"""The ranks of a run: sums and gathers over them, and random numbers by name."""

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, library

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.14


@dataclass(frozen=True)
class World:
    """Rank and size of the process group. No operation carries a gradient; at size 1 none communicates."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""

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


def uniform(name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers in [0,1), float32 of `shape`: the same for the same name and shape, on one kind of device."""
    return _uniform(_seed(name), list(shape), device)


def _seed(name: str) -> int:
    """A seed of 63 bits, by a hash of the name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


# What torch.compiler.assume_constant_result sets. Calling it would import the whole compiler, over a second, in every
# process; tests/parity/test_graphs.py fails if the name changes.
setattr(_seed, "_dynamo_marked_constant", True)  # noqa: B010


@library.custom_op("u2pl::uniform", mutates_args=())  # a graph can hold an operation, not a generator
def _uniform(seed: int, shape: list[int], device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(shape, generator=generator, device=device)


@_uniform.register_fake
def _(seed: int, shape: list[int], device: torch.device) -> Tensor:
    del seed
    return torch.empty(shape, device=device)
