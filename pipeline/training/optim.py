"""Optimiser and schedule from the config."""

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.config.methods import steps_of
from pipeline.config.schema import OptimConfig, RunConfig
from pipeline.methods import Method
from pipeline.ops.schedules import cosine, poly


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
    """SGD with momentum 0.9, or AdamW, over the method's parameter groups; on a GPU as one kernel for all of them.

    A group that names its own `optimizer` (`adam`: GCT's detector) gets one beside it.
    """
    by_kind: dict[str, list[dict[str, Any]]] = {}
    factors, undecayed = _layer_factors(method, config.layer_decay), _undecayed(method, config)
    for group in method.param_groups():
        kind = group.get("optimizer", config.optimizer)
        own = {key: value for key, value in group.items() if key != "optimizer"}
        by_kind.setdefault(kind, []).extend(_split(own, factors, undecayed))
    parts = [_build(kind, groups, config) for kind, groups in by_kind.items()]
    return parts[0] if len(parts) == 1 else Chain(parts)


def _layer_factors(method: Method, decay: float) -> dict[int, float]:
    """By id of a parameter of an encoder the factor of its learning rate: a power of `decay` (BEiT, arXiv 2106.08254).

    The exponent is the number of layers that lie behind; BEiT's is one more, which `optim.lr` can make up for.
    """
    encoders = [network.encoder.layers() for network in method.trained()]
    behind = ((depth, layer) for layers in encoders for depth, layer in enumerate(reversed(layers)))
    return {id(parameter): decay**depth for depth, layer in behind for parameter in layer}


def _undecayed(method: Method, config: OptimConfig) -> set[int]:
    """Ids of the parameters without weight decay: none, or norms, biases, and what an encoder calls its embeddings."""
    if config.decay_norms:
        return set()
    named = [each.encoder.get_parameter(name) for each in method.trained() for name in each.encoder.embeddings]
    return {id(parameter) for parameter in [*named, *(each for each in method.parameters() if each.dim() < 2)]}


def _split(group: dict[str, Any], factors: dict[int, float], undecayed: set[int]) -> list[dict[str, Any]]:
    """The group, parted by learning rate and by whether weights decay; in order of the first parameter of each part."""
    parts: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault((factors.get(id(parameter), 1.0), id(parameter) not in undecayed), []).append(parameter)
    return [
        {**group, "params": params, "lr_mult": group["lr_mult"] * factor, **({} if decays else {"weight_decay": 0.0})}
        for (factor, decays), params in parts.items()
    ]


def _build(kind: str, groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if all(parameter.is_cuda for group in groups for parameter in group["params"]):
        shared["fused"] = True
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, **shared)
    adam = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[kind]
    return adam(groups, **shared)


def build_scaler(device: torch.device, config: RunConfig) -> torch.amp.GradScaler:
    """What multiplies the loss, so that gradients do not vanish in float16; with other precisions it does nothing.

    The factor is halved where a gradient overflows, and doubled after 2000 steps without.
    """
    return torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")


def update(method: Method, optimizer: Optimizer, scaler: torch.amp.GradScaler, config: OptimConfig) -> bool:
    """Clips the gradient and steps the optimiser.

    Args:
        method: whose parameters have the gradient that all ranks share, of the loss that `scaler` has scaled.
        optimizer: of the method.
        scaler: from `build_scaler`.
        config: clipping, and what to do about a gradient that is not finite; with a scale it is always left out.

    Returns:
        False where the gradient was not finite and the update was left out; on every rank alike.
    """
    scaler.unscale_(optimizer)  # type: ignore[arg-type]  # a Chain has what is needed of an optimiser
    skips, limit = config.nonfinite == "skip" or scaler.is_enabled(), config.clip_norm or math.inf
    finite = True
    if skips or limit < math.inf:
        norm = nn.utils.clip_grad_norm_(method.parameters(), limit)
        finite = not skips or bool(norm.isfinite())
    if finite:
        scaler.step(optimizer)  # type: ignore[arg-type]
    scaler.update()
    return finite


def set_lr(optimizer: Optimizer, config: OptimConfig, step: int) -> float:
    """Sets the learning rate of `step` in every group and returns the encoder's, without `optim.layer_decay`.

    It is a function of the step, not of a scheduler's state, so a resumed run has the right one.
    """
    warmup = steps_of(config.warmup, config.steps)
    factors = {"poly": partial(poly, power=config.power), "cosine": cosine}
    lr = config.lr * factors[config.schedule](step, config.steps, warmup=warmup)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
    return lr
