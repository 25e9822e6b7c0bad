"""Uniform random numbers that are a function of a name, not of a generator's state."""

import hashlib

import torch
from torch import Tensor, library


def uniform(name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers in [0,1), float32 of `shape`, the same for the same name on one kind of device."""
    return _uniform(_seed(name), list(shape), device)


def _seed(name: str) -> int:
    """63 bits of a hash."""
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
