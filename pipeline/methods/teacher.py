"""What methods with an EMA teacher share: student, teacher, and the update of the teacher."""

import copy

import torch
from torch import Tensor, nn

from pipeline.config.schema import BatchNorm, Config
from pipeline.methods.base import Method, Step
from pipeline.models import SegmentationModel
from pipeline.ops.schedules import ema_decay


class TeacherMethod(Method):
    """A student and its teacher, the moving average of the student's parameters; the teacher is the method's result."""

    def __init__(
        self,
        config: Config,
        num_classes: int,
        batch_norm: BatchNorm,
        *,
        decay: float,
        start: float = 0,
        features: bool = False,
        statistics: bool = True,
    ) -> None:
        """Builds both networks; they begin as equals and never share storage.

        Args:
            config: of the run.
            num_classes: C.
            batch_norm: which images share batch statistics.
            decay: the largest decay of the average.
            start: until when the teacher is the student's copy: steps, or below 1 a share of the run.
            features: whether the networks have a representation head.
            statistics: average the statistics of batch norm too, for a teacher that only ever evaluates. Without, they
                come from the teacher's own passes in training mode.
        """
        super().__init__(config, num_classes, batch_norm)
        self.warmup = self.steps(start)
        self.student = self.build_network(features=features)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self._decay, self._statistics = decay, statistics

    def networks(self) -> dict[str, SegmentationModel]:
        """The teacher is the result, as in the releases."""
        return {"teacher": self.teacher, "student": self.student}

    def after_step(self, step: Step) -> None:
        """Moves the teacher: theta_T <- d theta_T + (1 - d) theta_S."""
        follow(self.teacher, self.student, self.decay(step), buffers=self._statistics)

    def decay(self, step: Step) -> float:
        """The decay of this step, min(1 - 1/(t+1), decay) with t counted from the end of the warm-up.

        Before that it is 0, which makes the teacher a copy of the student.
        """
        return ema_decay(step.index, self.warmup, self._decay)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float, *, buffers: bool = False) -> None:
    """Sets teacher to decay * teacher + (1 - decay) * student, all parameters in a few kernels.

    A decay of 0 makes an exact copy, buffers included. Storage is never shared.

    Args:
        teacher: changed in place.
        student: of the same structure.
        decay: in 0..1.
        buffers: average floating-point buffers too, and copy the others (counters).
    """
    averaged: list[tuple[Tensor, Tensor]] = list(zip(teacher.parameters(), student.parameters(), strict=True))
    counters = list[tuple[Tensor, Tensor]]()
    if decay == 0.0 or buffers:
        for pair in zip(teacher.buffers(), student.buffers(), strict=True):
            (averaged if pair[0].is_floating_point() else counters).append(pair)
    torch._foreach_lerp_(*_unzipped(averaged), 1.0 - decay)  # type: ignore[attr-defined]
    if counters:
        torch._foreach_copy_(*_unzipped(counters))  # type: ignore[attr-defined]


def _unzipped(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [mine for mine, _ in pairs], [other for _, other in pairs]
