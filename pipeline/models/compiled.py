"""Encoder stages and heads as compiled functions, for training steps."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.network import SegmentationModel
from pipeline.ops.kernel import problem_of


def compile_networks(networks: Sequence[SegmentationModel], trained: SegmentationModel, image: Tensor) -> str:
    """Compiles the stages and heads of networks in place, and tries them: forward and backward, at the training's size.

    Names of parameters stay as they are, and so do the networks' statistics and gradients. Each mode and number of
    images is compiled as it first occurs.

    Args:
        networks: those of a method.
        trained: the one of them that is tried, in training mode.
        image: uint8 [B,3,H,W], as a step has them.

    Returns:
        Why they do not run, in one line, and they are as before; or an empty string.
    """
    for number, part in enumerate(_parts(networks)):
        _compile(part, number)
    problem, buffers = "", [buffer.clone() for buffer in trained.buffers()]
    try:
        prediction = trained(image)
        torch.stack([output.float().mean() for output in prediction if output is not None]).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        problem = problem_of(error)
        release_networks(networks)
    trained.zero_grad(set_to_none=True)
    for buffer, before in zip(trained.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return problem


def release_networks(networks: Sequence[SegmentationModel]) -> None:
    """Takes back what `compile_networks` did."""
    for part in _parts(networks):
        part._compiled_call_impl = None


def uncompiled() -> AbstractContextManager[None]:
    """A context in which nothing is compiled: validation images have many sizes, and each would be compiled anew."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[return-value]


def _compile(part: nn.Module, number: int) -> None:
    """As `nn.Module.compile`, with code of its own: of one piece of code torch keeps eight compiled forms at most.

    Blocks of one class share theirs otherwise, and from the ninth on they would run uncompiled.
    """
    plain: Any = part._call_impl

    def call(*given: Tensor) -> Any:
        return plain(*given)

    call.__code__ = call.__code__.replace(co_name=f"part_{number}")
    part._compiled_call_impl = torch.compile(call, dynamic=False)  # type: ignore[assignment]


def _parts(networks: Sequence[SegmentationModel]) -> Iterator[nn.Module]:
    """The stages or blocks of the encoders, and what the decoders consist of."""
    for network in networks:
        for child in (*network.encoder.children(), *network.decoder.children()):
            if isinstance(child, nn.ModuleList):  # is not called itself
                yield from child
            else:
                yield child
