"""The exponential moving average that makes the teacher."""

import torch
from torch import nn


@torch.no_grad()
def update(teacher: nn.Module, student: nn.Module, decay: float, *, buffers: bool = False) -> None:
    """Sets teacher to decay * teacher + (1 - decay) * student, parameter by parameter.

    A decay of 0 makes an exact copy, buffers included. Storage is never shared.

    Args:
        teacher: changed in place.
        student: of the same structure.
        decay: in 0..1.
        buffers: average the BatchNorm statistics too (and copy counters), for a teacher that only ever runs in
            evaluation mode. Without, they are left to the teacher's own forwards in training mode.
    """
    for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.lerp_(other, 1.0 - decay)
    if decay == 0.0 or buffers:
        for mine, other in zip(teacher.buffers(), student.buffers(), strict=True):
            if decay == 0.0 or not mine.is_floating_point():
                mine.copy_(other)
            else:
                mine.lerp_(other, 1.0 - decay)
