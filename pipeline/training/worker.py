"""What runs in each Ray Train worker."""

import logging
from dataclasses import asdict
from typing import Any

import ray
import torch

from pipeline.config import Config, build
from pipeline.training.hosts import RayHost
from pipeline.training.loop import train


def work(values: dict[str, Any]) -> dict[str, Any]:
    """Trains; `values` is the config and the result this rank's progress, both as plain values."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config: Config = build(Config, values)
    assert config.out is not None
    cpus = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)))
    torch.set_num_threads(cpus)
    return asdict(train(config, RayHost(config.out, threads=max(1, cpus - 1))))
