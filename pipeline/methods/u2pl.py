"""U2PL with CutMix (Wang et al., CVPR 2022): unreliable pixels as negative samples.

L = L_s + L_u + lambda_c L_c. The teacher's entropy parts the unlabeled pixels: below gamma_t they carry pseudo-labels
(L_u), above it they fill class-wise memory banks with negatives for the pixel contrastive loss (L_c). This is the
method of the paper; where the released code differs from it, `docs/u2pl.md` says what we chose.
"""

import copy
import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.batch import Batch, Views, ViewSpec
from pipeline.config import Config, convert, require_positive, require_share
from pipeline.errors import UserError
from pipeline.methods.base import Losses, Method, Step
from pipeline.models import Prediction, SegmentationModel, upsample
from pipeline.ops import ema, mixing
from pipeline.ops.bank import MemoryBank
from pipeline.ops.contrast import Draws, Pixels, candidate_sets, contrastive_loss
from pipeline.ops.entropy import entropy, partition, shrink
from pipeline.ops.losses import IGNORE, unsupervised_cross_entropy
from pipeline.ops.schedules import ema_decay, unreliable_share

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class U2PLOptions:
    """U2PL; the defaults are the release's values for PASCAL VOC, lambda_c is the paper's."""

    warmup_steps: int = 570
    """Supervised steps before the teacher starts (release: one epoch on VOC, none on Cityscapes)."""
    ema_decay: float = 0.99
    """Largest decay of the EMA teacher."""
    alpha_0: float = 0.2
    """Share of unlabeled pixels that is unreliable at step 0; it falls linearly to 0."""
    lambda_c: float = 0.1
    """Weight of the contrastive loss."""
    temperature: float = 0.5
    """tau of the contrastive loss."""
    delta_p: float = 0.3
    """Least teacher probability of an anchor's own class."""
    r_l: int = 3
    """Rank from which on a class is unlikely: lower ranks are likely."""
    r_h: int = 20
    """Rank from which on a class is so unlikely that the pixel teaches nothing."""
    anchors: int = 256
    """Anchors per class, step and worker."""
    negatives: int = 50
    """Negatives per anchor."""
    keys: int = 256
    """New keys per class, step and worker at most."""
    queue: int = 30000
    """Capacity of a class's memory bank."""
    queue_background: int = 50000
    """Capacity of class 0's memory bank."""
    cutmix: float = 0.5
    """Probability that a step mixes its unlabeled images."""

    def __post_init__(self) -> None:
        sizes = ("temperature", "r_l", "anchors", "negatives", "keys", "queue", "queue_background")
        require_positive("u2pl", self, *sizes)
        require_share("u2pl", self, "ema_decay", "alpha_0", "delta_p", "cutmix")
        if self.r_l >= self.r_h:
            raise UserError(f"u2pl.r_l {self.r_l}: must be below u2pl.r_h {self.r_h}")


class _Mixed(NamedTuple):
    """The unlabeled side after CutMix."""

    images: Tensor
    """uint8 [B_u,3,H,W], mixed."""
    label: Tensor
    """int64 [B_u,H,W], pseudo-labels mixed along; 255 where there is no pixel."""


class U2PL(Method):
    """Student, EMA teacher, memory banks."""

    Options = U2PLOptions
    views = ViewSpec(unlabeled=True)

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.options: U2PLOptions = _clamped(convert(U2PLOptions, config.methods.get("u2pl", {}), "u2pl"), num_classes)
        self.student = self.build_network(features=True)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        sizes = [self.options.queue_background] + [self.options.queue] * (num_classes - 1)
        self.bank = MemoryBank(sizes, config.model.feature_dim)

    def networks(self) -> dict[str, SegmentationModel]:
        """The teacher is the result, as in the release; during warm-up it equals the student."""
        return {"teacher": self.teacher, "student": self.student}

    def after_step(self, step: Step) -> None:
        """EMA of the parameters; until the end of the warm-up the teacher is the student's copy."""
        decay = ema_decay(step.index, self.options.warmup_steps, self.options.ema_decay)
        ema.update(self.teacher, self.student, decay)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s during the warm-up, then L_s + L_u + lambda_c L_c (paper eq. 1)."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        if unlabeled is None or labeled.mask is None:
            raise ValueError("U2PL needs masks of the labeled and images of the unlabeled side")
        if step.index < self.options.warmup_steps:
            prediction = self.student(labeled.image)
            untouched = 0.0 * prediction.features.float().sum()  # DDP waits for every parameter's gradient
            return Losses({"supervised": self.supervised(prediction, labeled, step.world) + untouched}, {})
        mixed = self._teach(unlabeled, step)
        images = torch.cat([labeled.image, mixed.images])
        student: Prediction = self.student(images)
        with torch.no_grad():  # training mode: entropy, ranks and keys come from batch statistics, as in the release
            teacher: Prediction = self.teacher.train()(images)
        with torch.autocast(images.device.type, enabled=False):
            return self._losses(student, teacher, labeled, mixed.label, step)

    @torch.no_grad()
    def _teach(self, unlabeled: Views, step: Step) -> _Mixed:
        """Pseudo-labels of the clean images by the teacher in evaluation mode (paper eq. 4), then CutMix of both."""
        size = (unlabeled.image.shape[-2], unlabeled.image.shape[-1])
        logits = upsample(self.teacher.eval()(unlabeled.image).logits.float(), size)
        label = logits.argmax(1).masked_fill(~unlabeled.valid, IGNORE)
        count, device = len(label), label.device
        draws = step.uniform_per_image("cutmix", (count, 3), device)
        used = step.uniform_shared("mix", (1,), device) < self.options.cutmix
        box = mixing.cutmix_masks(draws, size) & used
        partner = mixing.partners(count, device)
        return _Mixed(mixing.mix(unlabeled.image, box, partner), mixing.mix(label, box, partner))

    def _losses(
        self, student: Prediction, teacher: Prediction, labeled: Views, pseudo_label: Tensor, step: Step
    ) -> Losses:
        options, world = self.options, step.world
        truth = labeled.mask
        assert truth is not None
        assert student.features is not None
        assert teacher.features is not None
        count, size = len(truth), (truth.shape[-2], truth.shape[-1])
        share = unreliable_share(step.index, step.total, options.alpha_0)
        alpha = torch.full((), share, device=truth.device)  # a copy of a host tensor would wait for the device
        values = entropy(upsample(teacher.logits[count:].float(), size))
        parts = partition(values, pseudo_label, alpha, world)
        kept = pseudo_label.masked_fill(~parts.reliable, IGNORE)
        unsupervised = unsupervised_cross_entropy(upsample(student.logits[count:].float(), size), kept, world)

        small = (student.features.shape[-2], student.features.shape[-1])
        known = truth != IGNORE
        pixels = Pixels(
            student=student.features,
            teacher=teacher.features,
            probability=teacher.logits.float().softmax(1),
            label=shrink(torch.cat([truth, pseudo_label]), small),
            reliable=shrink(torch.cat([known, parts.reliable]), small),
            unreliable=shrink(torch.cat([known, parts.unreliable]), small),
            labeled=torch.arange(count + len(pseudo_label), device=truth.device) < count,
        )
        sets = candidate_sets(pixels, options.delta_p, options.r_l, options.r_h)
        contrastive, anchors = contrastive_loss(
            pixels, sets, self.bank, self._draws(step, truth.device), options.temperature, world
        )
        supervised = self.supervised(
            Prediction(student.logits[:count], None, None if student.aux is None else student.aux[:count]),
            labeled,
            world,
        )
        terms = {
            "supervised": supervised,
            "unsupervised": unsupervised,
            "contrastive": options.lambda_c * contrastive,
        }
        logs = {
            "kept": parts.reliable.float().mean(),
            "entropy_threshold": parts.threshold,
            "anchors": anchors,
            "negatives": sets.negative.sum(1),
            "bank_fill": self.bank.count / self.bank.size,
            "pseudo_labels": _histogram(kept)[: self.num_classes],
        }
        return Losses(terms, logs)

    def _draws(self, step: Step, device: torch.device) -> Draws:
        classes, options = self.num_classes, self.options
        return Draws(
            anchors=step.uniform("anchors", (classes, options.anchors), device),
            keys=step.uniform("keys", (classes, options.keys), device),
            negatives=step.uniform("negatives", (classes, options.anchors, options.negatives), device),
        )


def _histogram(label: Tensor) -> Tensor:
    """Pixels per label, int64 [256]; `torch.bincount` would wait for the device."""
    counts = torch.zeros(IGNORE + 1, dtype=torch.int64, device=label.device)
    return counts.index_add_(0, label.flatten(), torch.ones_like(label).flatten())


def _clamped(options: U2PLOptions, num_classes: int) -> U2PLOptions:
    """Ranks end at the number of classes: with r_l >= C no pixel could ever be a negative."""
    if options.r_l < num_classes:
        return options
    lower = max(1, num_classes - 1)
    log.warning("u2pl.r_l %d leaves no negatives with %d classes: using %d", options.r_l, num_classes, lower)
    return U2PLOptions(**{**vars(options), "r_l": lower})
