"""CPS (Chen et al., CVPR 2021): two networks label each other's images.

L = L_s1 + L_s2 + lambda_cps L_cps. The networks differ in the initial weights of their heads alone.
"""

import torch
from torch import Tensor

from pipeline.batch import Batch, Views
from pipeline.config.options import CPSOptions
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Method, Step
from pipeline.models import SegmentationModel, upsample
from pipeline.ops import mixing
from pipeline.ops.entropy import IGNORE
from pipeline.ops.losses import masked_cross_entropy
from pipeline.ops.mixing import box_masks

BOXES = 3
"""Boxes per image (release: cutmix_boxmask_num)."""
AREA = (0.25, 0.5)
"""Smallest and largest share of the image that the boxes take together (release: cutmix_boxmask_prop_range)."""


class CPS(Method):
    """Two students, no teacher."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(CPSOptions)
        super().__init__(config, num_classes, options.batch_norm)
        self.options = options
        self.first = self.build_network(features=False)
        self.second = self.build_network(features=False)  # other random numbers, so other heads

    def networks(self) -> dict[str, SegmentationModel]:
        """The first network is the result, as in the release."""
        return {"first": self.first, "second": self.second}

    def trained(self) -> list[SegmentationModel]:
        """Both networks: each is trained by the labels of the other."""
        return [self.first, self.second]

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s1 + L_s2 + lambda_cps (CE(S_1(x), y_2) + CE(S_2(x), y_1)), y_k = argmax S_k(x) (paper section 3)."""
        labeled, unlabeled = self.sides(batch)
        mixed = self._mixed(unlabeled, step) if self.options.cutmix else None
        image = unlabeled.image if mixed is None else mixed[0]
        predictions = [self.forward_groups(network, labeled.image, image) for network in self.trained()]
        if mixed is None:
            valid = torch.cat([labeled.valid, unlabeled.valid])
            small = [torch.cat([of_labeled.logits, other.logits]) for of_labeled, other in predictions]
            logits = [upsample(each.float(), unlabeled.size) for each in small]
            labels = [_labels(each, valid) for each in logits]
        else:
            labels, logits = mixed[1], [upsample(other.logits.float(), unlabeled.size) for _, other in predictions]
        # labels are 255 on padding alone, so the pixels with a label are the valid ones
        cross = [
            masked_cross_entropy(own, label, label != IGNORE, step.world, "valid")
            for own, label in zip(logits, reversed(labels), strict=True)
        ]
        one, two = (self.supervised(of_labeled, labeled, step.world) for of_labeled, _ in predictions)
        terms = {"supervised": one, "supervised_2": two, "cross": self.options.lambda_cps * (cross[0] + cross[1])}
        agree = (labels[0] == labels[1]) & (labels[0] != IGNORE)
        return Losses(terms, {"agreement": agree.sum() / (labels[0] != IGNORE).sum().clamp_min(1)})

    @torch.no_grad()
    def _mixed(self, unlabeled: Views, step: Step) -> tuple[Tensor, list[Tensor]]:
        """CutMix of the unlabeled images, uint8 [B,3,H,W], and of each network's labels, int64 [B,H,W].

        The networks stay in training mode, as in the release: clean images move the batch statistics too.
        """
        size, device = unlabeled.size, unlabeled.image.device
        count = len(unlabeled.image)
        box = box_masks(step.uniform_per_image("cutmix", (count, BOXES, 4), device), size, AREA)
        partner = mixing.partners(count, device)
        clean = [upsample(network(unlabeled.image).logits.float(), size) for network in self.trained()]
        labels = [mixing.mix(_labels(logits, unlabeled.valid), box, partner) for logits in clean]
        return mixing.mix(unlabeled.image, box, partner), labels


def _labels(logits: Tensor, valid: Tensor) -> Tensor:
    """Hard labels of logits [B,C,H,W], 255 on padding: int64 [B,H,W]."""
    return logits.argmax(1).masked_fill(~valid, IGNORE)
