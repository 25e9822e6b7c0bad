"""A copy of the training state, from which another thread writes a checkpoint while training goes on."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def snapshot(state: Any) -> Callable[[], Any]:
    """Copies a state as it is now, without a wait for the device.

    From a GPU the tensors go to pinned memory, behind the kernels that were given to it so far and before those that
    will change them, so that only the thread that needs the copy waits. The copies stand in the training's own stream:
    a second one would save nothing, as the next step changes the state from its first layer on. On the CPU storages
    are copied whole, which keeps what shares memory and the bytes of the file.

    Args:
        state: dicts, lists and tuples of tensors and plain values.

    Returns:
        A call that gives the copy, with all tensors on the CPU; it may come from any thread.
    """
    on_gpu = [tensor for tensor in _tensors(state) if tensor.is_cuda]
    ready = torch.cuda.Event(blocking=True) if on_gpu else None
    copies: dict[int, Any] = {id(tensor): _pinned(tensor) for tensor in on_gpu}
    if ready is not None:
        ready.record(torch.cuda.current_stream(on_gpu[0].device))
    copied = copy.deepcopy(state, copies)  # finds those of the GPU already made

    def get() -> Any:
        if ready is not None:
            ready.synchronize()
        return copied

    return get


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, which torch keeps for the next one; under way when this returns."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _tensors(state: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for each in state.values() if isinstance(state, dict) else state:
            yield from _tensors(each)
