"""CutMix-Seg (French et al., BMVC 2020): the prediction of a mixed image agrees with the mixture of two predictions.

L = L_s + lambda_u L_u. The targets are probabilities of an EMA teacher; L_u is weighted by one number for the whole
batch, the share of its pixels with a confident target.
"""

import torch

from pipeline.batch import Batch
from pipeline.config.options import CutMixSegOptions
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Step
from pipeline.methods.teacher import TeacherMethod
from pipeline.models import upsample
from pipeline.ops import mixing
from pipeline.ops.losses import confident_share, probability_mse
from pipeline.ops.mixing import box_masks

AREA = (0.5, 0.5)
"""Share of the image that the box covers (release: mask_prop_range 0.5)."""


class CutMixSeg(TeacherMethod):
    """Student and EMA teacher; the teacher sees whole images, the student their mixture."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(CutMixSegOptions)
        super().__init__(config, num_classes, options.batch_norm, decay=options.ema_decay)
        self.options = options

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_u = c mean_pixels |softmax S(mix(x'_a, x'_b, M)) - mix(softmax T(x_a), softmax T(x_b), M)|^2 (section 3).

        c is the share of pixels whose mixed target is confident, one number for the batch of all ranks.
        """
        (labeled, unlabeled), options = self.sides(batch), self.options
        size, device = unlabeled.size, unlabeled.image.device
        with torch.no_grad():
            clean = upsample(self.teacher.eval().logits(unlabeled.image).float(), size).softmax(1)
        draws = step.uniform_per_image("cutmix", (len(clean), 1, 4), device)
        box, partner = box_masks(draws, size, AREA), mixing.partners(len(clean), device)
        view = unlabeled.strong[0] if options.strong else unlabeled.image
        image, target, valid = (mixing.mix(part, box, partner) for part in (view, clean, unlabeled.valid))

        of_labeled, student = self.forward_groups(self.student, labeled.image, image)
        logits = upsample(student.logits.float(), size)
        confident = confident_share(target.amax(1), valid, options.threshold, step.world)
        distance = probability_mse(logits, target, valid, step.world, "all")
        terms = {
            "supervised": self.supervised(of_labeled, labeled, step.world),
            "consistency": options.lambda_u * confident * distance,
        }
        return Losses(terms, {"confident": confident})
