"""Less memory for more work: parts of a forward pass that are computed a second time, for their backward pass.

What a layer keeps for its backward pass is most of the memory of a training step. A part that is recomputed keeps what
goes into it alone (Chen et al., arXiv 1604.06174).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from pipeline.models.parts import FeatureMaps, Prediction

In = TypeVar("In", Tensor, "FeatureMaps")
Out = TypeVar("Out", Tensor, "FeatureMaps", "Prediction")


def recomputed(module: nn.Module, function: Callable[..., Any], *inputs: Tensor) -> Any:
    """`function(*inputs)`, of which the inputs alone are kept for the backward pass.

    The second computation draws the numbers of the first one (dropout) and leaves no trace in the buffers, so the
    running statistics of batch norm move once. The result is that of a plain call, bit for bit where the device
    computes the same twice.

    Args:
        module: whose layers `function` runs.
        function: gives a tensor, or a tuple of them; changes none of its inputs in place.
        inputs: what is kept.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), BuffersKept(module)

    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


class BuffersKept(AbstractContextManager[None]):
    """Inside, a module works on copies of its buffers: what a forward pass does to them is lost. May be used again."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept: list[tuple[dict[str, Tensor | None], str, Tensor]] = []

    def __enter__(self) -> None:
        """Puts copies in the place of the buffers."""
        for owner in self._module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    self._kept.append((owner._buffers, name, buffer))
                    owner._buffers[name] = buffer.clone()

    def __exit__(self, *error: object) -> None:
        """Puts the buffers back."""
        while self._kept:
            buffers, name, buffer = self._kept.pop()
            buffers[name] = buffer


# ---- over parts of the batch --------------------------------------------------------------------------------------


def by_parts(module: nn.Module, function: Callable[[In], Out], given: In, parts: int) -> Out:
    """`function(given)`, computed for a part of the images at a time; only the last part is kept for its backward pass.

    The backward pass takes the parts from the last one to the first and computes each one anew but the last: at no time
    is more than one part of the images held. Part k has the images k, k + parts, k + 2 parts, ...: where a batch begins
    with labeled images and ends with unlabeled ones, each part has as many of both.

    Args:
        module: whose layers `function` runs.
        function: images or feature maps to outputs, image by image but for what it takes of the batch as a whole.
        given: of B images.
        parts: how many; divides B.

    Raises:
        ValueError: it does not.
    """
    tensors: list[Tensor] = [given] if isinstance(given, Tensor) else [each for each in given if each is not None]
    kind: Any = None if isinstance(given, Tensor) else type(given)
    if len(tensors[0]) % parts:
        raise ValueError(f"{len(tensors[0])} images in {parts} equal parts")

    def run(*some: Tensor) -> Out:
        return function(some[0] if kind is None else kind(*some))  # type: ignore[arg-type]

    cut = [[tensor[part::parts] for tensor in tensors] for part in range(parts)]
    outputs: list[Any] = [*(recomputed(module, run, *some) for some in cut[:-1]), run(*cut[-1])]
    return _woven(outputs)


def _woven(outputs: Sequence[Out]) -> Out:
    """The outputs of parts as those of the whole batch, each image in its place."""
    first: Any = outputs[0]
    if isinstance(first, Tensor):
        return torch.stack(list(outputs), 1).flatten(0, 1)  # type: ignore[arg-type]
    columns: Any = zip(*outputs, strict=True)
    return type(first)(*(None if column[0] is None else _woven(column) for column in columns))


# ---- over blocks of layers ----------------------------------------------------------------------------------------


def blocks(stage: nn.Module) -> Iterator[nn.Module]:
    """The modules that run after one another in a stage: its Sequentials, down to those that hold single layers."""
    children = list(stage.children())
    if isinstance(stage, nn.Sequential) and all(any(True for _ in child.children()) for child in children):
        for child in children:
            yield from blocks(child)
    else:
        yield stage
