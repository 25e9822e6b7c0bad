"""Naive self-training, the student: cross entropy over labeled images and pseudo-labeled ones alike.

This is the last of three stages; `pipeline.training.recipe` runs them all. In the first SupOnly trains a network, which
in the second labels the dataset's unlabeled images once. With strong views this is ST of the ST++ authors (Yang et al.,
CVPR 2022; main.py, dataset/semi.py of its release); without, the plain recipe.
"""

import torch
from torch import Tensor

from pipeline.batch import Batch, Views
from pipeline.config.options import SelfTrainingOptions
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Method, Step
from pipeline.methods.fixmatch import kept_share
from pipeline.models import SegmentationModel
from pipeline.ops.entropy import IGNORE
from pipeline.ops.mixing import small_box_masks


class SelfTraining(Method):
    """One network, trained from its initial weights on labels of another."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(SelfTrainingOptions)
        super().__init__(config, num_classes, options.batch_norm)
        self.options = options
        self.student = self.build_network(features=False)

    def networks(self) -> dict[str, SegmentationModel]:
        """The student alone."""
        return {"student": self.student}

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s over labeled and pseudo-labeled images, with the same weight for every pixel."""
        labeled, unlabeled = self.sides(batch)
        assert unlabeled.pseudo is not None  # `sides` has looked
        image, label = self.seen(unlabeled, unlabeled.pseudo, step)
        union = Views(
            torch.cat([labeled.image, image]),
            torch.cat([labeled.truth, label]),
            torch.cat([labeled.valid, unlabeled.valid]),
            labeled.ids + unlabeled.ids,
        )
        loss = self.supervised(self.forward_all(self.student, labeled.image, image), union, step.world)
        return Losses({"supervised": loss}, {"kept": kept_share(label, unlabeled.valid)})

    def seen(self, unlabeled: Views, label: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The view of the pseudo-labeled images that is trained on, with holes of noise, and its labels.

        Args:
            unlabeled: the unlabeled side.
            label: int64 [B,H,W], pseudo-labels.
            step: decides where holes are.

        Returns:
            uint8 [B,3,H,W], and int64 [B,H,W], which is 255 inside holes.
        """
        if not self.options.strong:
            return unlabeled.image, label
        draws = step.uniform_per_image("cutout", (len(label), 5), label.device)
        hole = small_box_masks(draws[:, :4], unlabeled.size) & (draws[:, 4] < self.options.cutout).view(-1, 1, 1)
        noise = step.uniform_per_image("noise", tuple(unlabeled.image.shape), label.device).mul(256).to(torch.uint8)
        return torch.where(hole.unsqueeze(1), noise, unlabeled.strong[0]), label.masked_fill(hole, IGNORE)
