"""Looking into a memory bank."""

import torch
from torch import Tensor

from pipeline.methods.u2pl.bank import MemoryBank


def ordered(bank: MemoryBank, label: int) -> Tensor:
    """The keys of one class, oldest first: float [count, D]."""
    count, size, offset = int(bank.count[label]), int(bank.size[label]), int(bank.offset[label])
    start = int(bank.pointer[label]) if count == size else 0
    return bank.keys[offset + (start + torch.arange(count)) % size]
