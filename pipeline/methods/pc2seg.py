"""PC2Seg (Zhong et al., ICCV 2021), a RECONSTRUCTION: no code is public, and its numbers are not the authors'.

L = L_s + l_1 L_cons + l_2 L_ctr. Confirmed by the paper's abstract: consistency between augmentations in label space
by a pixel-wise L2 loss and in feature space by a pixel contrastive loss, with sampled negatives. Ours: the weak view is
the fixed target of the strong one; the negatives come from other images and have another predicted class; all weights.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.batch import Batch, Views
from pipeline.config.options import PC2SegOptions
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Method, Step
from pipeline.models import Prediction, SegmentationModel
from pipeline.ops.grid import shrink
from pipeline.ops.losses import mean_count, probability_mse
from pipeline.ops.selection import Members, rows, take
from pipeline.ops.world import World

# ---- contrast between views -------------------------------------------------------------------------------------


class PairViews(NamedTuple):
    """The features of unlabeled images in two views."""

    strong: Tensor
    """float [B,D,h,w], gets the gradient."""
    weak: Tensor
    """float [B,D,h,w], held fixed: positives and negatives."""
    label: Tensor
    """int64 [B,h,w], predicted classes."""
    valid: Tensor
    """bool [B,h,w], cells that show an image."""


def pair_contrast(
    views: PairViews, anchors: Tensor, keys: Tensor, negatives: int, temperature: float, world: World
) -> Tensor:
    """L_ctr: the mean over anchors of -log(exp(z z'/tau) / (exp(z z'/tau) + N mean_j exp(z z'_j/tau))), 0-dim.

    z is the unit feature of a pixel in the strong view, z' that of the same pixel in the weak view, and z'_j are those
    of the drawn pixels of other images (of all ranks) with another predicted class: pixels of the same class would be
    false negatives. The mean stands for a draw of exactly N, so the loss does not depend on how many of the drawn
    pixels qualify. It is this rank's share of the mean over the anchors of all ranks.

    Args:
        views: of this rank's images.
        anchors: float [B,M] in [0,1), which pixels are anchors.
        keys: float [B,K] in [0,1), which pixels may be negatives.
        negatives: N.
        temperature: tau.
        world: ranks whose pixels are negatives and that share the mean.
    """
    members = Members(views.valid.flatten(1))
    any_valid = members.count > 0  # [B]
    area = views.valid[0].numel()
    offset = area * torch.arange(len(any_valid), device=any_valid.device)[:, None]
    anchor, key = members.draw(anchors) + offset, members.draw(keys) + offset  # [B,M], [B,K]
    label = views.label.flatten()
    z = F.normalize(take(rows(views.strong), anchor).float(), dim=-1).flatten(0, 1)  # [B*M,D]
    same = F.normalize(take(rows(views.weak.detach()), anchor).float(), dim=-1).flatten(0, 1)
    others = world.gather(F.normalize(take(rows(views.weak.detach()), key).float(), dim=-1)).flatten(0, 2)  # [W*B*K,D]
    other_label = world.gather(torch.where(any_valid[:, None], label[key], -1)).flatten()  # -1: nothing there

    image = world.rank * len(any_valid) + torch.arange(len(any_valid), device=any_valid.device)
    owner = torch.arange(len(others), device=any_valid.device) // keys.shape[1]
    apart = owner != image.repeat_interleave(anchors.shape[1])[:, None]
    fits = apart & (other_label >= 0) & (other_label != label[anchor].view(-1, 1))  # [B*M,W*B*K]
    count = fits.sum(1)
    positive = (z * same).sum(1) / temperature
    total = (z @ others.t() / temperature).masked_fill(~fits, -1e9).logsumexp(1)
    mean = total - count.clamp_min(1).log() + math.log(negatives)
    losses = torch.logaddexp(positive, mean) - positive
    active = any_valid.repeat_interleave(anchors.shape[1]) & (count > 0)
    return torch.where(active, losses, 0.0).sum() / mean_count(active, world)


# ---- the method -------------------------------------------------------------------------------------------------


class PC2Seg(Method):
    """One network with a projection head (U2PL's representation head); no teacher, no bank."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(PC2SegOptions)
        super().__init__(config, num_classes, options.batch_norm)
        self.options = options
        self.student = self.build_network(features=True)

    def networks(self) -> dict[str, SegmentationModel]:
        """The student alone."""
        return {"student": self.student}

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s on labeled images, both consistencies between the views of the unlabeled ones."""
        labeled, unlabeled = self.sides(batch)
        with torch.no_grad():
            weak = self.student(unlabeled.image)
        of_labeled, strong = self.forward_groups(self.student, labeled.image, unlabeled.strong[0])
        with torch.autocast(strong.logits.device.type, enabled=False):
            consistency, contrast = self._consistencies(strong, weak, unlabeled, step)
        terms = {
            "supervised": self.supervised(of_labeled, labeled, step.world),
            "consistency": self.options.consistency * consistency,
            "contrast": self.options.contrast * contrast,
        }
        return Losses(terms, {})

    def _consistencies(
        self, strong: Prediction, weak: Prediction, unlabeled: Views, step: Step
    ) -> tuple[Tensor, Tensor]:
        """L_cons, mean over pixels of ||softmax S(x') - sg softmax S(x)||^2, and L_ctr, see `pair_contrast`."""
        assert strong.features is not None
        assert weak.features is not None
        options, count = self.options, len(unlabeled.image)
        target = weak.logits.float().softmax(1)
        valid = shrink(unlabeled.valid, (target.shape[2], target.shape[3]))
        distance = probability_mse(strong.logits, target, valid, step.world, "valid")
        views = PairViews(strong.features, weak.features, target.argmax(1), valid)
        anchors = step.uniform_per_image("pc2seg/anchors", (count, options.anchors), valid.device)
        keys = step.uniform_per_image("pc2seg/keys", (count, options.keys), valid.device)
        contrast = pair_contrast(views, anchors, keys, options.negatives, options.temperature, step.world)
        return distance, contrast
