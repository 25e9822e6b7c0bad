"""What runs in each Ray Train worker."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from pipeline.cluster.console import StopAsked, send_logs
from pipeline.cluster.failures import out_of_memory
from pipeline.config import cli
from pipeline.config.methods import OPTIONS
from pipeline.errors import Diverged, UserError
from pipeline.patience import Patience
from pipeline.training.runtime import RayRuntime, machine
from pipeline.training.trainer import StoppedEarly, Trainer


def work(values: dict[str, Any]) -> dict[str, Any]:
    """Trains one rank.

    Args:
        values: `config` as plain values; `holder` of the run's lease; `line` to the driver's console; `labeled`: what
            the driver has read of the labeled images.

    Returns:
        The progress as plain values, or why the run could not start (`user_error`) or not go on (`diverged`), or the
        step after which it was `stopped`.
    """
    first = ray.train.get_context().get_world_rank() == 0
    send_logs(values["line"], logging.INFO if first else logging.WARNING)
    config = cli.resolve(values["config"], OPTIONS)
    assert config.out is not None
    runtime = RayRuntime(
        config.out,
        values["holder"],
        ray.get_runtime_context().get_assigned_resources(),
        Patience(config.run.storage_patience),
        StopAsked(values["line"]) if first else None,
    )
    runtime.labeled = values["labeled"]
    torch.set_num_threads(int(runtime.cpus))
    trainer, problem = None, ""
    try:
        with memory_told(runtime):
            trainer = Trainer(config, runtime)
    except UserError as error:
        problem = str(error)
    problem = _first(problem)
    if trainer is None or problem:  # starting the workers anew would not help
        return {"user_error": problem}
    try:
        with memory_told(runtime):
            return asdict(trainer.train())
    except Diverged as error:  # on every rank alike, as what follows
        return {"diverged": str(error)}
    except StoppedEarly as stop:
        return {"stopped": stop.step}


@contextmanager
def memory_told(runtime: RayRuntime) -> Iterator[None]:
    """Turns an error of a device that is out of memory into one with a remedy, which ends the run.

    Raises:
        UserError: it is out of memory: others in this worker's place would meet it again.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        problem = out_of_memory(error, str(machine(runtime.device())["device"]))
        if problem is None:
            raise
        raise problem from error


def _first(problem: str) -> str:
    """The first problem of any rank, or an empty string. All ranks stop together: the others would wait for ever."""
    if not dist.is_initialized():
        return problem
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")
