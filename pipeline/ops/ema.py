"""The exponential moving average that makes the teacher."""

import torch
from torch import nn


@torch.no_grad()
def update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Sets teacher to decay * teacher + (1 - decay) * student, parameter by parameter.

    BatchNorm buffers are not averaged (the teacher moves its own in its training-mode forwards); a decay of 0 makes an
    exact copy, buffers included. Storage is never shared.
    """
    for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.lerp_(other, 1.0 - decay)
    if decay == 0.0:
        for mine, other in zip(teacher.buffers(), student.buffers(), strict=True):
            mine.copy_(other)
