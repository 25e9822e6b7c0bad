"""UniMatch V1 (Yang et al., CVPR 2023): FixMatch with two strong views and a third stream of perturbed features.

L = (L_s + lambda_s (L_s1 + L_s2)/2 + lambda_fp L_fp) / 2.
"""

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config.options_fixmatch import UniMatchOptions
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Method, Partition, Step
from pipeline.methods.fixmatch import Pseudo, confident, cutmixed, kept_share
from pipeline.models import Prediction, SegmentationModel, upsample
from pipeline.models.parts import joined
from pipeline.ops.losses import confident_labels, masked_cross_entropy
from pipeline.ops.mixing import drop_channels


class UniMatch(Method):
    """One network and five batches of predictions: labeled, weak, weak with dropped channels, two strong views."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(UniMatchOptions)
        super().__init__(config, num_classes, options.batch_norm)
        self.options = options
        self.student = self.build_network(features=False)

    def networks(self) -> dict[str, SegmentationModel]:
        """The student alone."""
        return {"student": self.student}

    def partition(self, logits: Tensor, step: Step) -> Partition:
        """Reliable: a probability of `threshold` or more."""
        del step
        return confident(logits, self.options.threshold)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s1, L_s2 and L_fp are each the L_u of FixMatch, with the labels of the one weak view (paper section 3)."""
        (labeled, unlabeled), options = self.sides(batch), self.options
        size = unlabeled.size

        def loss(logits: Tensor, target: Pseudo) -> Tensor:
            return masked_cross_entropy(upsample(logits.float(), size), target.label, target.valid, step.world, "valid")

        of_labeled, weak, perturbed = self.weak(labeled.image, unlabeled.image, step)
        label = confident_labels(upsample(weak.float(), size), unlabeled.valid, options.threshold)
        own = Pseudo(unlabeled.image, label, unlabeled.valid)
        one, two = (
            cutmixed(own._replace(image=view), step, f"cutmix/{number}", options.cutmix)
            for number, view in enumerate(unlabeled.strong)
        )
        strong_1, strong_2 = self.student(torch.cat([one.image, two.image])).logits.chunk(2)
        terms = {
            "supervised": self.supervised(of_labeled, labeled, step.world) / 2,
            "strong": options.lambda_s * (loss(strong_1, one) + loss(strong_2, two)) / 4,
            "features": options.lambda_fp * loss(perturbed, own) / 2,
        }
        return Losses(terms, {"kept": kept_share(label, unlabeled.valid)})

    def weak(self, labeled: Tensor, unlabeled: Tensor, step: Step) -> tuple[Prediction, Tensor, Tensor]:
        """The prediction of the labeled images, and two logits of the unlabeled ones: plain, and with channels dropped.

        The encoder runs once. The decoder sees both versions in one batch, as in the release.
        """
        of_labeled, maps = self.forward_groups(self.student.encode, labeled, unlabeled)
        dropped = maps.changed(
            lambda name, each: drop_channels(
                each,
                step.uniform_per_image(f"drop/{name}", (each.shape[0], each.shape[1]), each.device),
                self.options.dropout,
            )
        )
        prediction, both = self.forward_groups(self.student.decode, of_labeled, joined([maps, dropped]))
        plain, perturbed = both.logits.chunk(2)
        return prediction, plain, perturbed
