"""torch.distributed over the workers of Ray Train.

Ray's own `TorchConfig` sets the same up, and imports torch in the controller of the run to do so, a process that never
computes; a sweep has one for each trial on its head. Here only the workers import it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

from pipeline.cluster.internals import get_address_and_port

LEAVE_SECONDS = 5.0
"""Seconds for the workers to end their part of a group; those of lost workers wait for ever."""


@dataclass
class ProcessGroup(BackendConfig):
    """One group of all workers."""

    backend: str
    """`nccl` or `gloo`."""
    timeout: float = 300.0
    """Seconds that a collective may take."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What joins them."""
        return _Rendezvous

    @property
    def train_func_context(self) -> Any:
        """What the training function runs in."""
        return _own_device


class _Rendezvous(Backend):
    share_cuda_visible_devices = True  # else NCCL does not see which GPUs share a machine

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroup)
        address, port = worker_group.execute_single(0, get_address_and_port)
        place = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(len(worker_group))}
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, {**place, "RANK": str(rank)}, backend_config.backend, backend_config.timeout
                )
                for rank in range(len(worker_group))
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        del backend_config
        ray.wait(left := worker_group.execute_async(_leave), num_returns=len(left), timeout=LEAVE_SECONDS)


def _join(place: dict[str, str], backend: str, timeout: float) -> None:
    """Runs in each worker."""
    from datetime import timedelta

    import torch.distributed as dist

    os.environ.update(place)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _own_device() -> Iterator[None]:
    """Makes the GPU that Ray gave this worker the current one of the thread that trains."""
    import torch
    from ray.train.torch import get_device

    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    yield
