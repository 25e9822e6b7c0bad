"""Optimiser and schedule from the config."""

import torch

from pipeline.config import OptimConfig
from pipeline.methods import Method
from pipeline.ops.schedules import poly


def build_optimizer(method: Method, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW, over the method's parameter groups."""
    groups = [group for group in method.param_groups() if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def set_lr(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int) -> float:
    """Sets the learning rate of `step` in every group and returns the encoder's.

    It is a function of the step, not of a scheduler's state, so a resumed run has the right one.
    """
    lr = config.lr * poly(step, config.steps, config.power, config.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
    return lr
