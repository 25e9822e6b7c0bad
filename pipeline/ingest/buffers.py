"""Memory for batches that is used again.

Fresh memory costs a page fault per 4 kB, about a sixth of the time that decoding takes.
"""

import weakref
from collections import defaultdict, deque
from math import prod

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Tensors in memory of earlier ones that nobody refers to any more; who keeps a batch keeps its memory."""

    def __init__(self, *, pinned: bool) -> None:
        """Args: pinned: page-locked memory, from which a GPU copies by itself; torch keeps and reuses it."""
        self._pinned = pinned
        self._free: defaultdict[int, deque[np.ndarray]] = defaultdict(deque)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with arbitrary content; may be called by several threads."""
        if self._pinned:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        size = prod(shape) * dtype.itemsize
        free = self._free[size]
        try:
            memory = free.popleft()
        except IndexError:
            memory = np.empty(size, np.uint8)
        lease = memory.view()  # the tensor and all tensors made of it hold this object, and nothing else does
        weakref.finalize(lease, free.append, memory).atexit = False
        return torch.from_numpy(lease).view(dtype).view(shape)
