"""UniMatch V2 (Yang et al., TPAMI 2025, arXiv 2410.10777): two strong views with parted channels learn from a teacher.

L = (L_s + lambda_u (L_s1 + L_s2)/2) / 2. The teacher labels the weak view; its confident labels supervise both views.
"""

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config.options_fixmatch import UniMatchV2Options
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Partition, Step
from pipeline.methods.fixmatch import Pseudo, confident, cutmixed, kept_share
from pipeline.methods.teacher import TeacherMethod
from pipeline.models import FeatureMaps, upsample
from pipeline.ops.losses import confident_labels, masked_cross_entropy


class UniMatchV2(TeacherMethod):
    """A student and a teacher that only ever evaluates."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(UniMatchV2Options)
        super().__init__(config, num_classes, options.batch_norm, decay=options.ema_decay)
        self.options = options

    def partition(self, logits: Tensor, step: Step) -> Partition:
        """Reliable: a probability of `threshold` or more."""
        del step
        return confident(logits, self.options.threshold)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s1 and L_s2 are each the L_u of FixMatch, with the teacher's labels of the one weak view."""
        (labeled, unlabeled), options = self.sides(batch), self.options
        size = unlabeled.size
        with torch.no_grad():
            weak = upsample(self.teacher.eval().logits(unlabeled.image).float(), size)
        label = confident_labels(weak, unlabeled.valid, options.threshold)
        one, two = (
            cutmixed(Pseudo(view, label, unlabeled.valid), step, f"cutmix/{number}", options.cutmix)
            for number, view in enumerate(unlabeled.strong)
        )
        of_labeled, maps = self.forward_groups(self.student.encode, labeled.image, torch.cat([one.image, two.image]))
        prediction, strong = self.forward_groups(self.student.decode, of_labeled, self.parted(maps, step))
        loss_1, loss_2 = (
            masked_cross_entropy(upsample(logits.float(), size), each.label, each.valid, step.world, "valid")
            for logits, each in zip(strong.logits.chunk(2), (one, two), strict=True)
        )
        terms = {
            "supervised": self.supervised(prediction, labeled, step.world) / 2,
            "strong": options.lambda_u * (loss_1 + loss_2) / 4,
        }
        return Losses(terms, {"kept": kept_share(label, unlabeled.valid)})

    def parted(self, maps: FeatureMaps, step: Step) -> FeatureMaps:
        """The feature maps of both views with each channel doubled in one view and 0 in the other (paper section 3.3).

        Which view has a channel is drawn for each image; maps with as many channels share the draw, so all four of a
        transformer do. A random share of the images of the global batch, `dropout`, is treated so.

        Args:
            maps: of 2B images: the first views of all, then the second ones.
            step: for the draws.
        """
        count, device = len(maps.high) // 2, maps.high.device
        chosen = self._chosen(count, step, device).view(-1, 1)

        def change(name: str, each: Tensor) -> Tensor:
            del name
            channels = each.shape[1]
            first = (step.uniform_per_image(f"channels/{channels}", (count, channels), device) < 0.5) * 2.0
            factors = torch.cat([torch.where(chosen, first, 1.0), torch.where(chosen, 2.0 - first, 1.0)])
            return each * factors.to(each.dtype)[:, :, None, None]

        return maps.changed(change)

    def _chosen(self, count: int, step: Step, device: torch.device) -> Tensor:
        """Which of this worker's images have their channels parted: bool [count]; of all workers' a fixed number."""
        total = count * step.world.size
        draws = step.uniform_shared("parted", (total,), device)
        chosen = draws.argsort().argsort() < round(self.options.dropout * total)
        return chosen[step.world.rank * count :][:count]
