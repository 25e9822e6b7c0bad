"""AEL (Hu et al., NeurIPS 2021): classes that the network predicts with low confidence are trained on more often.

L = L_s + L_cons(labeled) + L_cons(mixed). A running confidence by class steers three things: which classes are pasted
into labeled images, which class's region is cut into unlabeled ones, and how often a pixel of a class is learned from.
Code: hzhupku/SemiSeg-AEL; `docs/methods.md` says where we differ.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pipeline.batch import Batch, Views
from pipeline.config.options import AELOptions
from pipeline.config.schema import Config
from pipeline.methods.ael.sampling import ClassConfidence, DrawnCrops, Reservoir, draw_index, zoomed
from pipeline.methods.base import Losses, Step, untouched
from pipeline.methods.teacher import TeacherMethod
from pipeline.models import Prediction, upsample
from pipeline.ops import mixing
from pipeline.ops.entropy import IGNORE
from pipeline.ops.losses import weighted_cross_entropy
from pipeline.ops.mixing import Boxes, class_boxes, inside


class Targets(NamedTuple):
    """The teacher's prediction of each pixel, which the student is to learn."""

    label: Tensor
    """int64 [B,H,W], the likeliest class."""
    confidence: Tensor
    """float32 [B,H,W], its probability; 0 on padding."""


class Task(NamedTuple):
    """The images of a step and their targets."""

    labeled: Views
    """The labeled side, with pastes in images and masks."""
    of_labeled: Targets
    """The teacher's targets of the labeled images."""
    mixed: Tensor
    """uint8 [B_u,3,H,W], unlabeled images with a region of an earlier crop each."""
    of_mixed: Targets
    """The teacher's targets of the two parts, mixed as the images are."""


class AEL(TeacherMethod):
    """Student, EMA teacher, class confidence, and a reservoir of unlabeled crops."""

    features: ClassVar[bool] = False
    """Whether the networks have a representation head."""
    allowed: Tensor
    """float [C], 0 for classes that are never pasted."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(AELOptions)
        super().__init__(
            config, num_classes, options.batch_norm,
            decay=options.ema_decay, start=options.warmup, features=self.features,
        )  # fmt: skip
        self.options = options
        self.confidence = ClassConfidence(num_classes, self.options.momentum)
        self.reservoir = Reservoir(num_classes, self.options.depth, self.channels + 1, config.data.crop)
        allowed = torch.ones(num_classes)
        excluded = {*self.options.excluded, self.background}
        allowed[[k for k in range(num_classes) if k in excluded]] = 0.0
        self.register_buffer("allowed", allowed, persistent=False)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """Supervised loss with pastes, then consistency with the teacher on labeled and mixed images (paper eq. 1)."""
        labeled, unlabeled = self.sides(batch)
        labeled = self.paste(labeled, step)
        if step.index < self.warmup:
            prediction = self.student(labeled.image)
            supervised = self._labeled_loss(prediction, labeled, step)
            return Losses({"supervised": supervised + untouched(prediction)}, {})
        task = self.prepare(labeled, unlabeled, step)
        student = self.forward_all(self.student, labeled.image, task.mixed)
        with torch.autocast(labeled.image.device.type, enabled=False):
            return self.losses(student, task, step)

    @torch.no_grad()
    def prepare(self, labeled: Views, unlabeled: Views, step: Step) -> Task:
        """Makes the mixed images and all targets, and puts some of the unlabeled images into the reservoir."""
        partner = self.partners(len(unlabeled.image), step)
        seen = torch.cat([labeled.image, unlabeled.image, partner.crops[:, :-1]])
        # evaluation mode: clean images have other batch statistics than those the student learns with
        logits = self.teacher.eval().logits(seen)
        of_labeled, of_unlabeled, of_partner = self.targets(logits, labeled, unlabeled, partner)
        box = self.boxes(of_partner.label, partner, step)
        mixed = torch.where(box.unsqueeze(1), partner.crops[:, :-1], unlabeled.image)
        both = zip(of_unlabeled, of_partner, strict=True)
        self.remember(unlabeled, of_unlabeled.label, step)
        return Task(labeled, of_labeled, mixed, Targets(*(torch.where(box, theirs, own) for own, theirs in both)))

    @torch.no_grad()
    def paste(self, labeled: Views, step: Step) -> Views:
        """Adaptive copy-paste: pixels of low-confidence classes come from the batch's neighbour (paper section 3.3)."""
        options, count, device = self.options, len(labeled.image), labeled.image.device
        partner = mixing.partners(count, device)
        draws = step.uniform_per_image("ael/paste", (count, 5), device)
        image, mask = zoomed(labeled.image[partner], labeled.truth[partner], draws[:, :4], options.paste_zoom)
        weights = self.confidence.preference(0.5) * self.allowed
        chosen = draw_index(weights, step.uniform_shared("ael/classes", (options.paste_classes,), device))
        wanted = torch.zeros(IGNORE + 1, dtype=torch.bool, device=device).index_fill_(0, chosen, True)
        pasted = wanted[mask] & (draws[:, 4] < options.paste).view(-1, 1, 1) & (weights.sum() > 0)
        return dataclasses.replace(
            labeled,
            image=torch.where(pasted.unsqueeze(1), image, labeled.image),
            mask=torch.where(pasted, mask, labeled.truth),
            valid=labeled.valid | pasted,
        )

    def partners(self, count: int, step: Step) -> DrawnCrops:
        """An earlier crop for each of `count` unlabeled images, drawn by class: low confidence is drawn more often."""
        draws = step.uniform_per_image("ael/partner", (count, 2), self.confidence.value.device)
        return self.reservoir.draw(self.confidence.preference(), draws)

    def targets(self, logits: Tensor, labeled: Views, unlabeled: Views, partner: DrawnCrops) -> list[Targets]:
        """The teacher's targets of labeled, unlabeled and partner images, in this order; confidence is 0 on padding.

        Args:
            logits: float [B,C,h,w] of the teacher, of all these images.
            labeled: the labeled side.
            unlabeled: the unlabeled side.
            partner: the partners.
        """
        confidence, label = upsample(logits.float(), labeled.size).softmax(1).max(1)
        valid = torch.cat([labeled.valid, unlabeled.valid, partner.crops[:, -1] > 0])
        counts = [len(labeled.image), len(unlabeled.image), len(partner.crops)]
        return [Targets(*parts) for parts in zip(label.split(counts), (confidence * valid).split(counts), strict=True)]

    def boxes(self, label: Tensor, partner: DrawnCrops, step: Step) -> Tensor:
        """Adaptive CutMix: which pixels come from the partner, bool [B,H,W] (paper section 3.2).

        The box around the class that the crop was drawn for, if the teacher still finds enough of it in the partner.
        Else, or if that box covers more than half of the image, a random box of half the area.

        Args:
            label: int64 [B,H,W], the teacher's labels of the partners.
            partner: the partners.
            step: for the random boxes.
        """
        size, count = (label.shape[1], label.shape[2]), len(label)
        boxes = class_boxes(label, self.num_classes)
        own = Boxes(*(side.gather(1, partner.label[:, None]).squeeze(1) for side in boxes))
        area = (label == partner.label.view(-1, 1, 1)).flatten(1).float().mean(1)
        fits = (area > self.options.area) & (2 * own.height * own.width <= size[0] * size[1])
        anywhere = mixing.cutmix_masks(step.uniform_per_image("ael/box", (count, 3), label.device), size)
        return torch.where(fits.view(-1, 1, 1), inside(own, size), anywhere) & partner.found.view(-1, 1, 1)

    def remember(self, unlabeled: Views, label: Tensor, step: Step) -> None:
        """Puts some of this step's unlabeled crops into the reservoir, each for a class that covers enough of it."""
        label = label.masked_fill(~unlabeled.valid, IGNORE)
        classes = torch.arange(self.num_classes, device=label.device).view(1, -1, 1, 1)
        shown = (label.unsqueeze(1) == classes).flatten(2).float().mean(2) > self.options.area
        draws = step.uniform_shared("ael/fresh", (self.options.fresh, 2), label.device)
        crops = torch.cat([unlabeled.image, unlabeled.valid.unsqueeze(1).to(torch.uint8)], 1)
        self.reservoir.push(crops, shown, self.confidence.preference(), draws, step.world)

    def losses(self, student: Prediction, task: Task, step: Step) -> Losses:
        """L_s, and L_cons of labeled and of mixed images, weighted; L_s moves the class confidence first.

        Args:
            student: of labeled and mixed images; gets the gradient.
            task: the images and their targets.
            step: for the draws of pixels.
        """
        labeled, count = task.labeled, len(task.labeled.image)
        logits = upsample(student.logits.float(), labeled.size)
        terms = {  # the first one moves the class confidence, which the others use
            "supervised": self._labeled_loss(student.of(slice(count)), labeled, step),
            "consistency_labeled": self.consistency(logits[:count], task.of_labeled, "ael/labeled", step),
            "consistency_mixed": self.consistency(logits[count:], task.of_mixed, "ael/mixed", step),
        }
        logs = {
            "kept": (task.of_mixed.confidence >= self.options.threshold).float().mean(),
            "class_confidence": self.confidence.value.clone(),
            "reservoir": self.reservoir.count.float(),
        }
        return Losses(terms, logs)

    def _labeled_loss(self, prediction: Prediction, labeled: Views, step: Step) -> Tensor:
        """L_s; the student's probability of the true classes moves the class confidence."""
        logits = upsample(prediction.logits.detach().float(), labeled.size)
        self.confidence.update(logits, labeled.truth, step.world)
        return self.supervised(prediction, labeled, step.world)

    def consistency(self, logits: Tensor, teacher: Targets, name: str, step: Step) -> Tensor:
        """L_cons by dynamic re-weighting: sum_i w_i CE_i / sum_i w_i, 0-dim (paper section 3.4, eq. 8 to 10).

        w_i = m_i^gamma Bernoulli(r), with m_i the teacher's confidence and r the sampling rate of the class that the
        student predicts. A pixel below the threshold has weight 0.

        Args:
            logits: float [B,C,H,W] of the student; get the gradient.
            teacher: targets of the same images.
            name: key of the draws.
            step: for the draws.
        """
        rate = self.confidence.sampling_rate()[logits.detach().argmax(1)]
        drawn = step.uniform_per_image(name, tuple(teacher.label.shape), logits.device) < rate
        sure = (teacher.confidence >= self.options.threshold) & (teacher.confidence > 0)
        weight = teacher.confidence.pow(self.options.gamma) * (drawn & sure)
        return self.options.weight * weighted_cross_entropy(logits, teacher.label, weight, step.world)
