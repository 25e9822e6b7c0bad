"""PC2Seg (Zhong et al., ICCV 2021), a RECONSTRUCTION: no code is public, and its numbers are not the authors'.

L = L_s + l_1 L_cons + l_2 L_ctr. Confirmed by the paper's abstract: consistency between augmentations in label space
by a pixel-wise L2 loss and in feature space by a pixel contrastive loss, with sampled negatives. Ours: the weak view is
the fixed target of the strong one; the negatives come from other images and have another predicted class; all weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.batch import Batch, Views, ViewSpec
from pipeline.config import Config
from pipeline.methods.base import BatchNorm, Losses, Method, Step
from pipeline.models import Prediction, SegmentationModel
from pipeline.ops.grid import shrink
from pipeline.ops.masked import probability_mse
from pipeline.ops.pixel_pairs import PairViews, pair_contrast
from pipeline.typed import convert, require_positive


@dataclass(frozen=True, kw_only=True)
class PC2SegOptions:
    """PC2Seg: consistent labels, contrasted features (a reconstruction). All defaults are ours: no code is public."""

    consistency: float = 1.0
    """l_1: weight of the squared distance of the two views' probabilities, summed over the classes."""
    contrast: float = 0.1
    """l_2: weight of the contrastive loss."""
    temperature: float = 0.1
    """tau of the contrastive loss."""
    anchors: int = 256
    """Anchors per image."""
    keys: int = 64
    """Pixels per image that others may take as negatives."""
    negatives: int = 256
    """N: how many negatives an anchor has, in the weight of their mean."""
    batch_norm: BatchNorm = "separate"
    """Whether labeled and strong unlabeled images share batch statistics (ours: separate)."""

    def __post_init__(self) -> None:
        require_positive("pc2seg", self, "temperature", "anchors", "keys", "negatives")


class PC2Seg(Method):
    """One network with a projection head (U2PL's representation head); no teacher, no bank."""

    Options = PC2SegOptions
    views = ViewSpec(unlabeled=True, strong=1)

    def __init__(self, config: Config, num_classes: int) -> None:
        options = convert(PC2SegOptions, config.methods.get("pc2seg", {}), "pc2seg")
        super().__init__(config, num_classes, options.batch_norm)
        self.options: PC2SegOptions = options
        self.student = self.build_network(features=True)

    def networks(self) -> dict[str, SegmentationModel]:
        """The student alone."""
        return {"student": self.student}

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s on labeled images, both consistencies between the views of the unlabeled ones."""
        labeled, unlabeled = self.sides(batch)
        with torch.no_grad():
            weak = self.student(unlabeled.image)
        known, strong = self.passes(self.student, labeled.image, unlabeled.strong[0])
        with torch.autocast(strong.logits.device.type, enabled=False):
            consistency, contrast = self._consistencies(strong, weak, unlabeled, step)
        terms = {
            "supervised": self.supervised(known, labeled, step.world),
            "consistency": self.options.consistency * consistency,
            "contrast": self.options.contrast * contrast,
        }
        return Losses(terms, {})

    def _consistencies(
        self, strong: Prediction, weak: Prediction, unlabeled: Views, step: Step
    ) -> tuple[Tensor, Tensor]:
        """L_cons: mean over pixels of ||softmax S(x') - sg softmax S(x)||^2; L_ctr: see `ops.pixel_pairs`."""
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
