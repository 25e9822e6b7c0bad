"""U2PL (Wang et al., CVPR 2022): unreliable pixels as negative samples.

L = L_s + lambda_u L_u + lambda_c L_c. The teacher's entropy parts the unlabeled pixels: those below gamma_t carry
pseudo-labels (L_u), those from gamma_t on fill class-wise memory banks with negatives for the pixel contrastive loss
(L_c). This is the paper's method, with the release's choices where `docs/u2pl.md` says so; `variant: upstream` does as
the released code does in the rows marked D there.
"""

import logging
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.batch import Batch, Views
from pipeline.config.options import U2PLOptions
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Partition, Step, untouched
from pipeline.methods.teacher import TeacherMethod
from pipeline.methods.u2pl import fast, reference, upstream
from pipeline.methods.u2pl.bank import MemoryBank
from pipeline.methods.u2pl.reference import Candidates, Draws, Pixels, Positives, Reliability, Rule, averaged
from pipeline.models import Prediction
from pipeline.ops import mixing
from pipeline.ops.entropy import IGNORE, entropy, quantile
from pipeline.ops.grid import make_grid, shrink
from pipeline.ops.schedules import ema_decay, unreliable_share
from pipeline.ops.world import World

log = logging.getLogger(__name__)


class Augmentation(NamedTuple):
    """One step's strong augmentation, to be applied alike to images, labels, masks, logits and features."""

    mask: Tensor
    """bool [B,H,W], True where an image loses its own pixels."""
    partner: Tensor | None
    """int64 [B], whose pixels come in; None: they are erased."""

    def apply(self, own: Tensor, blank: Tensor | int) -> Tensor:
        """The augmented tensor.

        Args:
            own: [B,H,W] or [B,K,H,W], any dtype.
            blank: value of erased pixels.
        """
        if self.partner is not None:
            return mixing.mix(own, self.mask, self.partner)
        return torch.where(self.mask if own.dim() == 3 else self.mask.unsqueeze(1), blank, own)

    def apply_small(self, own: Tensor) -> Tensor:
        """As `apply`, for [B,K,h,w] at the network's resolution; erased pixels stay, as their label is 255."""
        if self.partner is None:
            return own
        return mixing.mix(own, shrink(self.mask, (own.shape[-2], own.shape[-1])), self.partner)


class UnlabeledTargets(NamedTuple):
    """The augmented unlabeled images, and what the student is to learn from them."""

    images: Tensor
    """uint8 [B_u,3,H,W], strongly augmented."""
    label: Tensor
    """int64 [B_u,H,W], pseudo-labels of `images`; 255 on padding and where pixels are cut out."""
    shown: Tensor
    """bool [B_u,H,W], the pixels that are not padding; pixels that are cut out count, as in the release."""
    teacher: Prediction
    """The teacher's prediction of labeled and unlabeled images, for entropy, class ranks and keys; no gradient."""


class U2PL(TeacherMethod):
    """Student, EMA teacher, memory bank."""

    prototypes: Tensor
    """float32 [C,D], smoothed positives."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = read_options(config, num_classes)
        super().__init__(
            config, num_classes, options.batch_norm,
            decay=options.ema_decay, start=options.warmup, features=True, statistics=False,
        )  # fmt: skip
        self.options = options
        self.bank = make_bank(self.options, config, num_classes)
        self.parts = fast if options.parts == "fast" else reference
        if self.options.prototype_ema:
            self.register_buffer("prototypes", torch.zeros(num_classes, config.model.feature_dim))

    def decay(self, step: Step) -> float:
        """The EMA decay of this step; 0 for the whole first epoch with `variant: upstream` (D8 of docs/u2pl.md)."""
        tied = self.options.variant == "upstream" and step.index < self.warmup + self.options.epoch_steps
        return 0.0 if tied else super().decay(step)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s during the warm-up, then L_s + lambda_u L_u + lambda_c L_c (paper eq. 1)."""
        labeled, unlabeled = self.sides(batch)
        if self.options.variant == "upstream":  # D6: padding is class 0, and pseudo-labels of padding count
            labeled = replace(labeled, mask=labeled.truth.masked_fill(~labeled.valid, 0))
            unlabeled = replace(unlabeled, valid=torch.ones_like(unlabeled.valid))
        if step.index < self.warmup:
            prediction = self.student(labeled.image)
            supervised = self.supervised(prediction, labeled, step.world)
            return Losses({"supervised": supervised + untouched(prediction)}, {})
        targets = self.targets(labeled, unlabeled, step)
        student = self.forward_all(self.student, labeled.image, targets.images)
        with torch.autocast(labeled.image.device.type, enabled=False):
            return self.losses(student, targets, labeled, step)

    # ---- what the teacher says ----------------------------------------------------------------------------------

    @torch.no_grad()
    def targets(self, labeled: Views, unlabeled: Views, step: Step) -> UnlabeledTargets:
        """Pseudo-labels of the clean images (paper eq. 6), strong augmentation, and the teacher's second look.

        Labels come from the teacher in evaluation mode; entropy, class ranks and keys from a second look in training
        mode, with batch statistics, as in the release. With `teacher_passes` 1 all of it comes from one look at the
        clean images, in training mode.
        """
        count, image = len(labeled.image), unlabeled.image
        look = self._look(labeled.image, image) if self.options.teacher_passes == 1 else None
        logits = self.teacher.eval().logits(image) if look is None else look.logits[count:]
        grid = make_grid((image.shape[-2], image.shape[-1]), (logits.shape[-2], logits.shape[-1]))
        label = grid.label(logits).masked_fill(~unlabeled.valid, IGNORE)
        change, shown = self._change(label, step), unlabeled.valid
        if change is not None:
            shown = change.apply(shown, shown)
            image = change.apply(image, self.student.mean.round().to(image.dtype))  # about 0 after normalisation
            label = change.apply(label, IGNORE)
            look = look and _mixed_outputs(look, count, change)
        return UnlabeledTargets(image, label, shown, look or self._look(labeled.image, image))

    def _look(self, labeled: Tensor, unlabeled: Tensor) -> Prediction:
        """The teacher's prediction in training mode, by batch statistics; moves its running ones too."""
        return self.forward_all(self.teacher.train(), labeled, unlabeled)

    def _change(self, label: Tensor, step: Step) -> Augmentation | None:
        """This step's strong augmentation of images with these labels [B,H,W]; None if `mix` is none.

        In the steps that go without it, its mask is False everywhere.
        """
        kind, count, size = self.options.mix, len(label), (label.shape[1], label.shape[2])
        if kind == "none":
            return None
        if kind == "classmix":
            draws = step.uniform_per_image("classmix", (count, self.num_classes), label.device)
            mask = mixing.classmix_masks(draws, label)
        else:
            mask = mixing.cutmix_masks(step.uniform_per_image("cutmix", (count, 3), label.device), size)
        used = step.uniform_shared("mix", (1,), label.device) < self.options.mix_share
        return Augmentation(mask & used, None if kind == "cutout" else mixing.partners(count, label.device))

    # ---- the losses ---------------------------------------------------------------------------------------------

    def losses(self, student: Prediction, targets: UnlabeledTargets, labeled: Views, step: Step) -> Losses:
        """The weighted loss terms of a step, and its logs.

        In this order: thresholds, partition and L_u; the pixels that may be anchors and negatives; the random draws;
        anchors, positives and new keys; the update of the bank and L_c; L_s.

        Args:
            student: of labeled and augmented unlabeled images; gets the gradient.
            targets: of the unlabeled images.
            labeled: the labeled side.
            step: for schedules and draws.
        """
        options, truth, count = self.options, labeled.truth, len(labeled.image)
        alpha = torch.full((), self.alpha(step), device=truth.device)  # a copy of a host tensor would wait
        needs_surest = options.variant == "upstream" or options.negative_pixels == "reliable"
        split = self.parts.unsupervised(
            student.logits[count:],
            targets.teacher.logits[count:],
            targets.label,
            targets.shown,
            torch.stack([1.0 - alpha, alpha]) if needs_surest else (1.0 - alpha).view(1),
            step.world,
            step.world if options.thresholds == "global" else World(),
        )
        may_be_anchor = split.surest if options.variant == "upstream" else split.reliable
        may_be_negative = _negative_pixels(split, options.negative_pixels)
        pixels = make_pixels(student, targets.teacher, truth, targets.label, may_be_anchor, may_be_negative)
        draws = make_draws(options, step, self.num_classes, truth.device)
        found, positive = self._candidates(pixels, draws, step)
        contrastive = self.parts.contrastive(
            pixels, found, positive, self.bank, draws, options.temperature, step.world, binary=options.loss == "binary"
        )
        supervised = self.supervised(student.of(slice(count)), labeled, step.world)
        terms = {
            "supervised": supervised,
            "unsupervised": options.lambda_u * split.loss,
            "contrastive": self.contrast_weight(step.world) * contrastive,
        }
        logs = {
            "kept": split.kept_share,
            "alpha": alpha,
            "entropy_threshold": split.thresholds[0],
            "anchors": found.anchor_count,
            "negatives": found.negative_count,
            "bank_fill": self.bank.count / self.bank.size,
            "pseudo_labels": _histogram(split.label)[: self.num_classes],
        }
        return Losses(terms, logs)

    def alpha(self, step: Step) -> float:
        """alpha_t of this step, constant over each `epoch_steps` steps if those are set."""
        held = self.options.epoch_steps or 1
        return unreliable_share(step.index // held * held, step.total, self.options.alpha_0)

    # ---- for people to look at ----------------------------------------------------------------------------------

    def partition(self, logits: Tensor, step: Step) -> Partition:
        """Reliable: an entropy below gamma_t. Negatives: of the classes that `unlikely` gives, by `negative_pixels`.

        With `variant: upstream` nothing is a negative: a pixel must also carry the label of the class (D2), and what
        one look at the image labels is its likeliest class. In training a few are, as labels come from another look.
        """
        values, alpha = entropy(logits), torch.tensor(self.alpha(step))
        reliable = values < quantile(values, 1.0 - alpha)
        sources = {
            "unreliable": ~reliable,
            "reliable": values <= quantile(values, alpha),
            "all": torch.ones_like(reliable),
        }
        may_be_negative = sources[self.options.negative_pixels] & (self.options.variant == "paper")
        return Partition(reliable, may_be_negative[:, None] & unlikely(logits, self.options))

    def stored_keys(self) -> list[Tensor]:
        """The keys in the memory bank."""
        return self.bank.held()

    # ---- parts of the losses ------------------------------------------------------------------------------------

    def contrast_weight(self, world: World) -> float:
        """Weight of L_c: lambda_c; with `variant: upstream` divided by the number of workers (D4 of docs/u2pl.md)."""
        return self.options.lambda_c / (world.size if self.options.variant == "upstream" else 1)

    def _candidates(self, pixels: Pixels, draws: Draws, step: Step) -> tuple[Candidates, Positives]:
        """Anchors, positives and new keys, by the paper's rules or the release's."""
        rule = Rule(self.options.delta_p, self.options.r_l, self.options.r_h)
        if self.options.variant == "paper":
            found = self.parts.candidates(pixels, rule, draws)
            positive = self._smoothed(self.parts.positives(found, step.world), step)
            return found, positive
        halves = pixels.label[: pixels.labeled], pixels.label[pixels.labeled :]
        own = torch.cat([upstream.one_hot(half, self.num_classes) for half in halves])
        found = upstream.candidates(pixels, own, rule, draws)
        return upstream.mispaired(found, self._smoothed(upstream.positives(found), step))

    def _smoothed(self, positive: Positives, step: Step) -> Positives:
        """The positives, or with `prototype_ema` their moving average, by the release's decay min(1 - 1/i, 0.999)."""
        if not self.options.prototype_ema:
            return positive
        decay = torch.full((), ema_decay(step.index, self.warmup, 0.999), device=positive.mean.device)
        self.prototypes.copy_(averaged(self.prototypes, positive, decay))
        return positive._replace(mean=self.prototypes)


def _mixed_outputs(teacher: Prediction, count: int, change: Augmentation) -> Prediction:
    """The teacher's outputs of clean images, mixed as the images are; the first `count` are labeled and stay."""
    assert teacher.features is not None
    logits, features = (
        torch.cat([output[:count], change.apply_small(output[count:])]) for output in (teacher.logits, teacher.features)
    )
    return Prediction(logits, features, None)


def _negative_pixels(split: Reliability, kind: Literal["unreliable", "reliable", "all"]) -> Tensor:
    """Which pixels of unlabeled images may be negatives, bool [B_u,h,w]; `kind` as `U2PLOptions.negative_pixels`."""
    if kind == "unreliable":
        return split.unreliable
    return split.surest if kind == "reliable" else split.known


def _histogram(label: Tensor) -> Tensor:
    """Number of pixels by label, int64 [256]; `torch.bincount` would wait for the device."""
    counts = torch.zeros(IGNORE + 1, dtype=torch.int64, device=label.device)
    return counts.index_add_(0, label.flatten().long(), torch.ones_like(label, dtype=torch.int64).flatten())


# ---- shared with U2PL on AEL (`with_ael.py`) --------------------------------------------------------------------


def read_options(config: Config, num_classes: int) -> U2PLOptions:
    """The section `u2pl`, with r_l lowered to C - 1, the last class rank: above it no pixel could be a negative."""
    options = config.options_of(U2PLOptions)
    if options.r_l < num_classes:
        return options
    lower = max(1, num_classes - 1)
    # every rank makes the method, and of others than the first only warnings are shown
    log.info("u2pl.r_l %d leaves no negatives with %d classes: using %d", options.r_l, num_classes, lower)
    return replace(options, r_l=lower)


def unlikely(logits: Tensor, options: U2PLOptions) -> Tensor:
    """The classes of which unlabeled pixels may be negatives: r_l <= O(c) < r_h, bool [n,C].

    Args:
        logits: float [n,C].
        options: with r_l below C.
    """
    ordered, last = logits.sort(1, descending=True).values, min(options.r_h, logits.shape[1])
    return (logits < ordered[:, options.r_l - 1, None]) & (logits >= ordered[:, last - 1, None])


def make_bank(options: U2PLOptions, config: Config, num_classes: int) -> MemoryBank:
    """An empty memory bank for the features of the config's network."""
    sizes = [options.queue_background] + [options.queue] * (num_classes - 1)
    return MemoryBank(sizes, config.model.feature_dim, getattr(torch, options.bank_dtype))


def make_draws(options: U2PLOptions, step: Step, num_classes: int, device: torch.device) -> Draws:
    """The random numbers of a step's contrast, drawn by each worker for itself."""
    return Draws(
        anchors=step.uniform("anchors", (num_classes, options.anchors), device),
        keys=step.uniform("keys", (num_classes, options.keys_of(step.world.size)), device),
        negatives=step.uniform("negatives", (num_classes, options.groups, options.negatives), device),
    )


def make_pixels(
    student: Prediction,
    teacher: Prediction,
    truth: Tensor,
    label: Tensor,
    may_be_anchor: Tensor,
    may_be_negative: Tensor,
) -> Pixels:
    """The pixels of all images at the resolution of the features.

    Args:
        student: of labeled and unlabeled images; its features get the gradient.
        teacher: of the same images.
        truth: int64 [B_l,H,W].
        label: int64 [B_u,H,W], pseudo-labels.
        may_be_anchor: bool [B_u,h,w], which pixels of unlabeled images may be anchors and positives.
        may_be_negative: bool [B_u,h,w], which of them may be negatives.
    """
    assert student.features is not None
    assert teacher.features is not None
    size = (may_be_anchor.shape[1], may_be_anchor.shape[2])
    labels = torch.cat([shrink(truth, size), shrink(label, size)])
    has_truth = labels[: len(truth)] != IGNORE
    return Pixels(
        student=student.features,
        teacher=teacher.features,
        logits=teacher.logits,
        label=labels,
        may_be_anchor=torch.cat([has_truth, may_be_anchor]),
        may_be_negative=torch.cat([has_truth, may_be_negative]),
        labeled=len(truth),
    )
