"""What a step asks of a worker's memory, weighed before the first one on tensors that have a shape and no values."""

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pipeline.batch import Batch, Views
from pipeline.config.methods import SPECS
from pipeline.config.schema import Config, without_weights
from pipeline.inference.load import autocast
from pipeline.methods import Method, Step, build_method
from pipeline.ops import kernel
from pipeline.ops.world import World
from pipeline.training.scaling import allowed_counts

GIB = 2**30


def estimate(config: Config, classes: int, workers: int, held: int | None = None) -> str:
    """One line: what a step needs on each worker, and what helps where that is more than a GPU has.

    It warns and refuses nothing: what it weighs is the step as it is written, and a step that does not fit shows so in
    seconds, with the same remedies.

    Args:
        config: of the run.
        classes: C.
        workers: that share the batch.
        held: bytes of a GPU; None: not known.
    """
    need = needed(config, classes, workers)
    said = f"a step needs about {need / GIB:.{int(need < 10 * GIB)}f} GiB of memory on each worker"
    if held is None or need <= held:
        return said
    found = remedies(config, classes, workers, held)
    less = f"use {' or '.join(found)}" if found else "use a smaller batch, crop or backbone"
    return f"{said}; its GPU has {held / GIB:.0f}: {less}"


def remedies(config: Config, classes: int, workers: int, held: int) -> list[str]:
    """The single changes, as flags, that let a step fit into `held` bytes; arguments as for `estimate`."""
    optim, tried = config.optim, dict[str, tuple[Config, int]]()
    for count in allowed_counts(config):
        if count > workers:
            tried[f"--scaling.workers {count}"] = config, count
    if config.run.precision == "fp32":
        tried["--run.precision bf16"] = replace(config, run=replace(config.run, precision="bf16")), workers
    if not config.model.checkpoint_activations:
        again = replace(config, model=replace(config.model, checkpoint_activations=True))
        tried["--model.checkpoint_activations true"] = again, workers
    for parts in (2 * optim.accumulate, 4 * optim.accumulate, 8 * optim.accumulate):
        finer = replace(config, optim=replace(optim, accumulate=parts))
        if workers in allowed_counts(finer):
            tried[f"--optim.accumulate {parts}"] = finer, workers
    found: dict[str, str] = {}
    for flag, (changed, count) in tried.items():
        key = flag.partition(" ")[0]
        if key not in found and needed(changed, classes, count) <= held:  # of each key the least change
            found[key] = flag
    return list(found.values())


def needed(config: Config, classes: int, workers: int) -> int:
    """The most bytes that a step has in use at once on each worker: networks, buffers, optimiser, batch, and the step.

    A step in the middle of the run is made, forward and backward, on the CPU without values, as the code is written:
    what the device's libraries take for themselves comes on top, and compiled losses take less.

    Args:
        config: of the run; weights are not read.
        classes: C.
        workers: that share the batch.
    """
    with torch.device("meta"):  # nothing is drawn for the weights
        method = build_method(without_weights(config), classes).train()
    device, steps = torch.device("cpu"), config.optim.steps
    with kernel.as_written(), FakeTensorMode(allow_non_fake_inputs=True), Weighing() as weighing:
        hollow(method, device)
        batch = empty_batch(config, workers, device)
        with autocast(device, config.run):
            terms = method(batch, Step(steps // 2, steps, config.seed, World())).terms
        torch.stack(list(terms.values())).sum().backward()
    states = 2 if config.optim.optimizer == "adamw" else 1
    return weighing.most + states * sum(each.nbytes for each in method.parameters() if each.requires_grad)


def gpu_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


class Weighing(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations below it make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        """The most bytes that were in use at once."""
        self._known = set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operation and weighs what it gives."""
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, Tensor):
                self._weigh(each.untyped_storage())
        return result

    def _weigh(self, storage: torch.UntypedStorage) -> None:
        """Counts a piece of memory once, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._freed, key, size)
        self._now += size
        self.most = max(self.most, self._now)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def hollow(method: Method, device: torch.device) -> None:
    """Puts tensors of `device` in the place of a method's own; below FakeTensorMode they have no values."""

    def empty(like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)

    for module in method.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(empty(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else empty(buffer)


def empty_batch(config: Config, workers: int, device: torch.device) -> Batch:
    """What the loader gives to one of so many workers, on `device`, with arbitrary content."""
    spec, size, channels = SPECS[config.method].views, config.data.crop, len(config.data.mean) or 3

    def side(images: int, masked: bool, strong: int) -> Views:
        image = torch.empty(images, channels, *size, dtype=torch.uint8, device=device)
        label = torch.empty(images, *size, dtype=torch.int64, device=device)
        valid, ids = torch.empty(images, *size, dtype=torch.bool, device=device), tuple(map(str, range(images)))
        others = tuple(torch.empty_like(image) for _ in range(strong))
        return Views(image, label if masked else None, valid, ids, others, label if spec.pseudo else None)

    labeled = side(config.optim.batch_labeled // workers, True, 0)
    unlabeled = side(config.optim.batch_unlabeled // workers, False, spec.strong) if spec.unlabeled else None
    return Batch(labeled, unlabeled)
