"""What a training step asks of a GPU, counted without one: waits, copies, collectives, and what backward holds.

    python benchmarks/device_step.py [--methods suponly u2pl] [--presets voc_classic] [--worlds 1 4 8] [--precision P]

The step of the trainer runs on tensors that have a shape and the device cuda, and no values (torch's FakeTensorMode),
as rank 0 of a process group whose collectives do nothing. Counted are the operations that reach the device. What has no
such tensors is left out: DDP's reducer, whose traffic is the bytes of the gradients, and compiled kernels, which run as
they are written, on the grid that they are compiled for. Nothing is timed.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installation, like the jobs

from pipeline.batch import Batch
from pipeline.config.schema import Config
from pipeline.methods import METHODS, Method, build_method, make_config
from pipeline.models.norm import sync_batchnorm
from pipeline.ops import grid
from pipeline.ops.world import World
from pipeline.training.memory import empty_batch, hollow
from pipeline.training.optim import build_optimizer, build_scaler
from pipeline.training.trainer import Trainer

CUDA = torch.device("cuda", 0)
GPU_PRESETS = {"voc_classic": 21, "voc_blender": 21, "cityscapes": 19, "voc_unimatch_v2": 21, "voc_u2pl_vit": 21}
"""The presets for GPUs, with the number of classes of their datasets."""
WORLDS = (1, 4, 8)


class Found(NamedTuple):
    """What one step comes to, on one rank."""

    waits: int
    """Operations for which the CPU waits until the device has caught up."""
    copies: int
    """Copies between the memories of host and device."""
    collectives: int
    """Messages to the other ranks, without those of DDP."""
    sent: int
    """Bytes that this rank gives to them."""
    gradients: int
    """Bytes that DDP averages."""
    saved: int
    """Bytes that the forward pass keeps for the backward pass, without parameters, buffers and the batch."""


# ---- counting ---------------------------------------------------------------------------------------------------

_WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "unique_dim",
    "_unique2",
    "equal",
    "is_nonzero",
)


class Counting(TorchDispatchMode):
    """Counts what the operations under it ask of the device; stands in for kernels that know no fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.where: Counter[str] = Counter()
        """Operations that wait or copy, by name."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operation on fake tensors, or gives what it would, and counts it."""
        kwargs = kwargs or {}
        namespace, name = func.namespace, func._schema.name.partition("::")[2]
        if namespace == "c10d":
            self.count["collectives"] += 1
            self.count["sent"] += _payload(args)
        elif name in _WAITS or (name.startswith("index") and _has_masks(args)):
            self._note("waits", name)
            if name == "_local_scalar_dense":
                return 1
            return args[0].clone() if name.startswith("index") else func(*args, **kwargs)
        elif _crosses(name, args, kwargs):
            self._note("copies", name)
        return _STAND_INS[name](*args) if name in _STAND_INS else func(*args, **kwargs)

    def _note(self, kind: str, name: str) -> None:
        self.count[kind] += 1
        self.where[name] += 1


def _payload(args: tuple[Any, ...]) -> int:
    """Bytes that a rank puts into a collective: of an all-gather the second argument, of a reduction the only one."""
    tensors = [each for each in args if isinstance(each, Tensor)] or [each for each in args if isinstance(each, list)]
    given = tensors[-1]
    return sum(each.nbytes for each in _flat(given))


def _flat(given: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for each in given:
            yield from _flat(each)


def _has_masks(args: tuple[Any, ...]) -> bool:
    """Whether an indexing is by a mask: the size of its result must be known on the host."""
    places = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in places)


def _crosses(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation copies between host and device."""
    if name == "copy_":
        return bool(args[0].device.type != args[1].device.type)
    target = kwargs.get("device")
    return name == "_to_copy" and target is not None and torch.device(target).type != args[0].device.type


def _channels(x: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(count))


_STAND_INS: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": lambda x, *_: _channels(x, 2),
    "batch_norm_gather_stats_with_counts": lambda x, *_: _channels(x, 2),
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda grad, *_: _channels(grad, 4),
    "batch_norm_backward_elemt": lambda grad, x, *_: torch.empty_like(x),
    "_fused_sgd_": lambda *_: None,
}
"""Kernels of CUDA alone, which torch has given no shapes: what they return."""


def saved_bytes(losses: Sequence[Tensor], owned: Sequence[Tensor]) -> int:
    """Bytes that the graph of `losses` holds for the backward pass, each piece of memory once.

    Args:
        losses: 0-dim.
        owned: tensors whose memory does not count, as somebody else holds it anyway.
    """
    storages = {each.untyped_storage()._cdata: each.untyped_storage() for each in _saved(losses)}
    others = {each.untyped_storage()._cdata for each in owned}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in others)


def _saved(losses: Sequence[Tensor]) -> Iterator[Tensor]:
    """The tensors that the nodes of a graph hold."""
    for node in _nodes([loss.grad_fn for loss in losses]):
        names = [name for name in dir(node) if name.startswith("_saved_")]
        yield from _flat([getattr(node, name) for name in names])
        yield from _flat(getattr(node, "saved_tensors", None))


def _nodes(roots: Sequence[Any]) -> Counter[Any]:
    """Every node of the graphs that end in `roots`, with the number of gradients that it waits for."""
    pending = [root for root in roots if root is not None]
    waiting = Counter[Any](dict.fromkeys(pending, 0))
    for node in pending:  # grows while it is read
        for following, _ in node.next_functions:
            if following is not None:
                if following not in waiting:
                    pending.append(following)
                waiting[following] += 1
    return waiting


# ---- a backward pass without a device ---------------------------------------------------------------------------


def gradients(loss: Tensor, inputs: Sequence[Tensor] | None = None) -> list[Tensor | None]:
    """Runs the graph of a 0-dim loss backwards, node by node.

    Autograd's own engine asks CUDA for its streams, which a machine without one does not have.

    Args:
        loss: 0-dim.
        inputs: whose gradients are returned; None: those of all leaves are added to their `grad`.
    """
    start, waiting = loss.grad_fn, _nodes([loss.grad_fn])
    wanted = [None if inputs is None else get_gradient_edge(each).node for each in inputs or ()]
    given: dict[Any, dict[int, Tensor]] = {start: {0: torch.ones_like(loss)}}
    results, ready = dict[Any, Tensor | None](), [start]
    while ready:
        node: Any = ready.pop()
        slots = given.pop(node, {})
        results[node] = slots.get(0)
        outputs = _applied(node, slots, inputs is None) if slots else ()
        for (following, place), gradient in zip(node.next_functions, outputs or [None] * 99, strict=False):
            if following is None:
                continue
            if gradient is not None:
                expected = following._input_metadata[place]  # nodes leave it to the engine to undo broadcasts and casts
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
                into = given.setdefault(following, {})
                into[place] = into[place] + gradient if place in into else gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)
    return [results.get(each) for each in wanted]


def _applied(node: Any, slots: dict[int, Tensor], accumulate: bool) -> tuple[Any, ...]:
    """Gradients by the inputs of a node, from those by its outputs."""
    if hasattr(node, "variable"):
        leaf: Tensor = node.variable
        if accumulate:
            leaf.grad = slots[0] if leaf.grad is None else leaf.grad + slots[0]
        return ()
    with torch.no_grad():
        count = len(node._input_metadata)
        call = node.apply if isinstance(node, BackwardCFunction) else node
        outputs = call(*(slots.get(index) for index in range(count)))
    return outputs if isinstance(outputs, tuple) else (outputs,)


@contextmanager
def as_if_on_a_gpu() -> Iterator[None]:
    """A context for fake tensors: backward passes run through `gradients`, autocast and compiled grids are there."""

    def grad(outputs: Sequence[Tensor], inputs: Sequence[Tensor], *_: Any, **__: Any) -> tuple[Tensor | None, ...]:
        return tuple(gradients(outputs[0], inputs))

    with (
        patch.object(Tensor, "backward", lambda loss: gradients(loss) and None),
        patch("torch.autograd.grad", grad),
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda *_: True),
        patch.object(grid, "is_active", lambda: True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


# ---- a step ---------------------------------------------------------------------------------------------------------


def trace(config: Config, classes: int, world: int, index: int | None = None) -> tuple[Found, Counter[str]]:
    """Runs one step of the trainer on rank 0 of so many.

    Args:
        config: of the run; weights are not loaded.
        classes: C.
        world: number of ranks.
        index: of the step; None: in the middle of the run, where every loss is in use.

    Returns:
        What it comes to, and which operations wait or copy.
    """
    with torch.device("meta"):  # nothing is drawn for the weights
        method = build_method(replace(config, model=replace(config.model, weights="none")), classes).train()
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with as_if_on_a_gpu():
            hollow(method, CUDA)
            return _traced(method, config, world, config.optim.steps // 2 if index is None else index)
    finally:
        if world > 1:
            dist.destroy_process_group()


def _traced(method: Method, config: Config, world: int, index: int) -> tuple[Found, Counter[str]]:
    if world > 1:
        sync_batchnorm(method)
    batch = empty_batch(config, world, CUDA)
    owned = [*method.parameters(), *method.buffers(), *_tensors(batch)]
    counting, held = Counting(), 0

    def model(*given: Any) -> Any:
        nonlocal held
        losses = method(*given)
        held = saved_bytes(list(losses.terms.values()), owned)
        return losses

    trainer = bare_trainer(config, method, CUDA)
    trainer.model = model
    with counting:
        Trainer.step(trainer, batch, index)
    exchanged = sum(each.nbytes for each in method.parameters() if each.requires_grad) if world > 1 else 0
    exchanged //= 2 if config.run.gradients == "bf16" else 1
    count = counting.count
    return (
        Found(count["waits"], count["copies"], count["collectives"], count["sent"], exchanged, held),
        counting.where,
    )


def bare_trainer(config: Config, method: Method, device: torch.device) -> Any:
    """What `Trainer.step` looks at, without data, run directory and DDP.

    Args:
        config: of the run.
        method: its networks lie on `device`.
        device: where the step runs.
    """
    return SimpleNamespace(
        config=config, world=World.current(), device=device, method=method, model=method, progress=SimpleNamespace(),
        optimizer=build_optimizer(method, config.optim), scaler=build_scaler(device, config.run),
    )  # fmt: skip


def _tensors(batch: Batch) -> Iterator[Tensor]:
    for side in filter(None, (batch.labeled, batch.unlabeled)):
        yield from (each for each in (side.image, side.mask, side.valid, *side.strong, side.pseudo) if each is not None)


# ---- the table --------------------------------------------------------------------------------------------------


def case(method: str, preset: str, **values: Any) -> Config:
    """The config of a method on a preset, with the one thing that only a dataset knows: VOC's background."""
    known = {"data.background": "none" if preset == "cityscapes" else "0", "model.weights": "none"}
    frozen = {"cutmix_seg.batch_norm": "separate"} if method == "cutmix_seg" else {}  # that asks for weights
    return make_config({"method": method, **known, **frozen, **values}, preset=preset)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    add("--presets", nargs="+", default=list(GPU_PRESETS), choices=list(GPU_PRESETS), metavar="PRESET")
    add("--worlds", nargs="+", type=int, default=list(WORLDS), metavar="GPUS")
    add("--precision", choices=["fp32", "bf16"], help="default: the preset's")
    args = parser.parse_args()
    print("| preset | method | GPUs | waits | copies | collectives | sent, MB | gradients, MB | saved, GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for preset in args.presets:
        for method in args.methods:
            for world in args.worlds:
                config = case(method, preset, **({"run.precision": args.precision} if args.precision else {}))
                found, where = trace(config, GPU_PRESETS[preset], world)
                row = (
                    f"| {preset} | {method} | {world} | {found.waits} | {found.copies} | {found.collectives} | "
                    f"{found.sent / 1e6:.2f} | {found.gradients / 1e6:.0f} | {found.saved / 2**30:.1f} |"
                )
                print(row + (f" {dict(where)}" if where else ""), flush=True)


if __name__ == "__main__":
    main()
