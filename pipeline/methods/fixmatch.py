"""FixMatch (Sohn et al., NeurIPS 2020) for segmentation, as UniMatch's authors run it.

L = (L_s + lambda_u L_u) / 2. No teacher: the network's own confident labels of the weak view supervise its prediction
of the strong view.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config.options_fixmatch import FixMatchOptions
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Method, Partition, Step
from pipeline.models import SegmentationModel, upsample
from pipeline.ops import mixing
from pipeline.ops.entropy import IGNORE
from pipeline.ops.losses import confident_labels, masked_cross_entropy
from pipeline.ops.mixing import small_box_masks


class Pseudo(NamedTuple):
    """Images and their pseudo-labels."""

    image: Tensor
    """uint8 [B,3,H,W]."""
    label: Tensor
    """int64 [B,H,W], pseudo-labels; 255 where the network was not confident, and on padding."""
    valid: Tensor
    """bool [B,H,W], the pixels that are not padding; the loss is a mean over them."""


class FixMatch(Method):
    """One network that labels its own weak view."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(FixMatchOptions)
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
        """L_u = mean_valid [max q >= threshold] CE(S(strong), argmax q), q = softmax S(weak) (paper eq. 4)."""
        (labeled, unlabeled), options = self.sides(batch), self.options
        of_labeled, weak = self.forward_groups(self.student, labeled.image, unlabeled.image)
        logits = upsample(weak.logits.float(), unlabeled.size)
        label = confident_labels(logits, unlabeled.valid, options.threshold)
        mixed = cutmixed(Pseudo(unlabeled.strong[0], label, unlabeled.valid), step, "cutmix", options.cutmix)
        strong = upsample(self.student(mixed.image).logits.float(), unlabeled.size)
        terms = {
            "supervised": self.supervised(of_labeled, labeled, step.world) / 2,
            "strong": options.lambda_u
            * masked_cross_entropy(strong, mixed.label, mixed.valid, step.world, "valid")
            / 2,
        }
        return Losses(terms, {"kept": kept_share(label, unlabeled.valid)})


def confident(logits: Tensor, threshold: float) -> Partition:
    """Pixels parted by whether the likeliest class of their logits, float [n,C], has a probability of `threshold`."""
    everywhere = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    return Partition(confident_labels(logits, everywhere, threshold) != IGNORE)


def cutmixed(own: Pseudo, step: Step, name: str, probability: float) -> Pseudo:
    """CutMix with the neighbour in the batch; each image is mixed or not by its own draw, keyed by `name`."""
    count, device = len(own.image), own.image.device
    draws = step.uniform_per_image(name, (count, 5), device)
    used = (draws[:, 4] < probability).view(-1, 1, 1)
    box = small_box_masks(draws[:, :4], (own.image.shape[-2], own.image.shape[-1])) & used
    partner = mixing.partners(count, device)
    return Pseudo(*(mixing.mix(part, box, partner) for part in own))


def kept_share(label: Tensor, valid: Tensor) -> Tensor:
    """Share of this rank's valid pixels that carry a label: 0-dim float32."""
    return (label != IGNORE).sum() / valid.sum().clamp_min(1)
