"""Optimiser and schedule from the config."""

from typing import Any

import torch

from pipeline.config.schema import OptimConfig
from pipeline.methods import Method
from pipeline.ops.schedules import poly, steps_of


class Chain:
    """Several optimisers that step together and look like one to trainer and checkpoint."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimisers."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets the gradients of all parameters to None, or to 0 if `set_to_none` is False."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        """Steps every optimiser once."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of all optimisers, as a list in order under `parts`."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for part, values in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(values)


Optimizer = torch.optim.Optimizer | Chain


def build_optimizer(method: Method, config: OptimConfig) -> Optimizer:
    """SGD with momentum 0.9, or AdamW, over the method's parameter groups.

    A group that names its own `optimizer` (`adam`: GCT's detector) gets one beside it.
    """
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for group in method.param_groups():
        if group["params"]:
            kind = group.get("optimizer", config.optimizer)
            own = {key: value for key, value in group.items() if key != "optimizer"}
            by_kind.setdefault(kind, []).append(own)
    parts = [_build(kind, groups, config) for kind, groups in by_kind.items()]
    return parts[0] if len(parts) == 1 else Chain(parts)


def _build(kind: str, groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    adam = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[kind]
    return adam(groups, lr=config.lr, weight_decay=config.weight_decay)


def set_lr(optimizer: Optimizer, config: OptimConfig, step: int) -> float:
    """Sets the learning rate of `step` in every group and returns the encoder's.

    It is a function of the step, not of a scheduler's state, so a resumed run has the right one.
    """
    lr = config.lr * poly(step, config.steps, config.power, steps_of(config.warmup, config.steps))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
    return lr
