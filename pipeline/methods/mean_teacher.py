"""Mean Teacher (Tarvainen and Valpola, NeurIPS 2017) for segmentation: the student agrees with its moving average.

L = L_s + lambda_u w(t) L_cons. The public recipes differ: TorchSemiSeg compares probabilities of all images and tests
the student, PixelSSL compares logits of the unlabeled ones. `docs/methods.md` says what we chose.
"""

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config.options import MeanTeacherOptions
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Step
from pipeline.methods.teacher import TeacherMethod
from pipeline.models import upsample
from pipeline.ops.losses import probability_mse, squared_error
from pipeline.ops.schedules import sigmoid_ramp


class MeanTeacher(TeacherMethod):
    """Student and EMA teacher on the same weak view."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(MeanTeacherOptions)
        super().__init__(config, num_classes, options.batch_norm, decay=options.ema_decay)
        self.options = options

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s + lambda_u w(t) mean_{pixels, classes} (softmax S(x) - softmax T(x))^2 (paper section 2)."""
        (labeled, unlabeled), options = self.sides(batch), self.options
        of_labeled, student = self.forward_groups(self.student, labeled.image, self._noisy(unlabeled.image, step))
        with torch.no_grad():
            target = upsample(self.teacher.eval().logits(unlabeled.image).float(), unlabeled.size)
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
