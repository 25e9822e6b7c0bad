"""What runs in each Ray Train worker."""

import logging
from dataclasses import asdict
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from pipeline.cluster.console import send_logs
from pipeline.config import cli
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.storage import Patience
from pipeline.training.meter import Diverged
from pipeline.training.runtime import RayRuntime
from pipeline.training.trainer import Trainer


def work(values: dict[str, Any]) -> dict[str, Any]:
    """Trains one rank.

    Args:
        values: `config` as plain values, and `console`, the driver's queue.

    Returns:
        The progress as plain values, or why the run could not start (`user_error`) or not go on (`diverged`).
    """
    first = ray.train.get_context().get_world_rank() == 0
    send_logs(values["console"], logging.INFO if first else logging.WARNING)
    config = cli.resolve(values["config"], OPTIONS)
    assert config.out is not None
    runtime = RayRuntime(
        config.out, ray.get_runtime_context().get_assigned_resources(), Patience(config.run.storage_patience)
    )
    torch.set_num_threads(int(runtime.cpus))
    trainer, problem = None, ""
    try:
        trainer = Trainer(config, runtime)
    except UserError as error:
        problem = str(error)
    problem = _first(problem)
    if trainer is None or problem:  # starting the workers anew would not help
        return {"user_error": problem}
    try:
        return asdict(trainer.train())
    except Diverged as error:  # on every rank alike
        return {"diverged": str(error)}


def _first(problem: str) -> str:
    """The first problem of any rank, or an empty string. All ranks stop together: the others would wait for ever."""
    if not dist.is_initialized():
        return problem
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")
