"""Where views are made: in threads of the worker, or in tasks on whatever CPUs the cluster has.

Both call the same pure function per sample, so the pixels are the same. Samples reach both as encoded bytes; from the
cluster come finished views, about twenty times as many bytes: a bargain only for GPU nodes without CPUs to spare.
"""

import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.batch import Views
from pipeline.errors import UserError
from pipeline.ingest.augment import Outcome, ViewRecipe, empty_views, fill
from pipeline.ingest.read import DECODE_CPUS, Sample


class Buffers:
    """Reuses the memory of tensors that nobody refers to any more."""

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


TASKS = 16
"""Decoding tasks of one worker at a time. A task makes the views of one side of a step."""
Decoded = tuple[Views, list[Outcome]]


class Decoder(Protocol):
    """Makes the views of several groups of samples at a time."""

    def submit(self, samples: Sequence[Sample]) -> Callable[[], Decoded]:
        """Starts decoding. The result, when called, waits for the views and each sample's outcome, in order."""
        ...

    def close(self) -> None:
        """Cancels what has not begun."""
        ...


class ThreadDecoder:
    """Decodes in threads of this process."""

    def __init__(self, recipe: ViewRecipe, threads: int, buffers: Buffers) -> None:
        self._recipe, self._buffers = recipe, buffers
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def submit(self, samples: Sequence[Sample]) -> Callable[[], Decoded]:
        """See `Decoder`."""
        views = empty_views(samples, self._recipe, self._buffers.take)
        jobs = [self._pool.submit(fill, sample, self._recipe, views, place) for place, sample in enumerate(samples)]
        return lambda: (views, [job.result() for job in jobs])

    def close(self) -> None:
        """See `Decoder`."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class ClusterDecoder:
    """Decodes in Ray tasks on any node. Ray repeats a task whose node is lost."""

    def __init__(self, recipe: ViewRecipe, buffers: Buffers) -> None:
        import ray

        self._recipe, self._buffers = recipe, buffers
        self._task: Any = ray.remote(num_cpus=DECODE_CPUS, scheduling_strategy="SPREAD")(_decode)
        self._pool = ThreadPoolExecutor(TASKS, thread_name_prefix="fetch")

    def submit(self, samples: Sequence[Sample]) -> Callable[[], Decoded]:
        """See `Decoder`."""
        return self._pool.submit(self._fetch, samples).result

    def close(self) -> None:
        """See `Decoder`."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, samples: Sequence[Sample]) -> Decoded:
        import ray
        from ray.exceptions import RayTaskError

        sent = [_copied(sample) for sample in samples]
        try:
            arrays, outcomes = ray.get(self._task.remote(sent, self._recipe))
        except RayTaskError as error:  # Ray's own carries a traceback
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise
        views = empty_views(samples, self._recipe, self._buffers.take)
        for tensor, array in zip(_tensors(views), arrays, strict=True):
            tensor.numpy()[:] = array  # what comes out of the object store is read-only, and goes when it is dropped
        return views, outcomes


def _decode(samples: Sequence[Sample], recipe: ViewRecipe) -> tuple[list[np.ndarray], list[Outcome]]:
    """The views of samples as arrays, and what became of each sample; runs in a Ray task."""
    views = empty_views(samples, recipe, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    outcomes = [fill(sample, recipe, views, place) for place, sample in enumerate(samples)]
    return [tensor.numpy() for tensor in _tensors(views)], outcomes


def _copied(sample: Sample) -> Sample:
    """The sample with copies of its bytes, as a memoryview cannot be pickled."""
    parts = {name: getattr(sample, name) for name in ("image", "mask", "label")}
    return replace(sample, **{name: None if part is None else bytes(part) for name, part in parts.items()})


def _tensors(views: Views) -> list[Tensor]:
    masks = [each for each in (views.mask, views.pseudo) if each is not None]
    return [views.image, *masks, views.valid, *views.strong]
