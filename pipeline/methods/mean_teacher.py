"""Mean Teacher (Tarvainen and Valpola, NeurIPS 2017) for segmentation: the student agrees with its moving average.

L = L_s + lambda_u w(t) L_cons. The public recipes differ: TorchSemiSeg compares probabilities of all images and tests
the student, PixelSSL compares logits of the unlabeled ones. `docs/methods.md` says what we chose.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.batch import Batch, ViewSpec
from pipeline.config.parse import require_share
from pipeline.config.schema import Config
from pipeline.methods.base import BatchNorm, Losses, Step
from pipeline.methods.teacher import TeacherMethod
from pipeline.models import upsample
from pipeline.ops.losses import probability_mse, squared_error
from pipeline.ops.schedules import sigmoid_ramp


@dataclass(frozen=True, kw_only=True)
class MeanTeacherOptions:
    """Mean Teacher: the student agrees with its moving average. The weight is TorchSemiSeg's, the ramp PixelSSL's."""

    lambda_u: float = 100.0
    """Weight of the consistency loss (TorchSemiSeg 100 on probabilities; PixelSSL 1 on logits)."""
    ramp: float = 0.0625
    """Length of the weight's rise: steps, or below 1 a share of the run (PixelSSL: 5 epochs, here of 80); 0: none."""
    ema_decay: float = 0.99
    """Largest decay of the EMA teacher (TorchSemiSeg, PixelSSL)."""
    on_logits: bool = False
    """Compare logits instead of probabilities (PixelSSL)."""
    input_noise: float = 0.0
    """Deviation of Gaussian noise on the student's unlabeled images, in grey levels of 0..255 (PixelSSL: 0)."""
    batch_norm: BatchNorm = "separate"
    """Whether labeled and unlabeled images share batch statistics (TorchSemiSeg: separate; PixelSSL: joint)."""

    def __post_init__(self) -> None:
        require_share("mean_teacher", self, "ema_decay")


class MeanTeacher(TeacherMethod):
    """Student and EMA teacher on the same weak view."""

    Options = MeanTeacherOptions
    views = ViewSpec(unlabeled=True)
    durations = ("mean_teacher.ramp",)

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(MeanTeacherOptions)
        super().__init__(config, num_classes, options.batch_norm, decay=options.ema_decay)
        self.options = options

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s + lambda_u w(t) mean_{pixels, classes} (softmax S(x) - softmax T(x))^2 (paper section 2)."""
        (labeled, unlabeled), options = self.sides(batch), self.options
        of_labeled, student = self.forward_groups(self.student, labeled.image, self._noisy(unlabeled.image, step))
        with torch.no_grad():
            target = upsample(self.teacher.eval()(unlabeled.image).logits.float(), unlabeled.size)
        logits = upsample(student.logits.float(), unlabeled.size)
        if options.on_logits:
            distance = squared_error(logits, target, unlabeled.valid, step.world, "valid")
        else:
            distance = probability_mse(logits, target.softmax(1), unlabeled.valid, step.world, "valid")
        weight = options.lambda_u * sigmoid_ramp(step.index, self.steps(options.ramp))
        terms = {
            "supervised": self.supervised(of_labeled, labeled, step.world),
            "consistency": weight / self.num_classes * distance,
        }
        return Losses(terms, {"consistency_weight": torch.full((), weight)})

    def _noisy(self, image: Tensor, step: Step) -> Tensor:
        """The images uint8 [B,3,H,W], or float32 with noise added."""
        if not self.options.input_noise:
            return image
        uniform = step.uniform_per_image("noise", tuple(image.shape), image.device)
        return image + self.options.input_noise * torch.special.ndtri(uniform.clamp_min(1e-7))
