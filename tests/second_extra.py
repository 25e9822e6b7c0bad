"""A second implementation of U2PL's extra, as `--against` of the benchmarks takes it: plain torch, by the equations.

It rehearses the comparison; its L_c is simpler than the paper's, so its times say nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.u2pl_step import Case, Step
from pipeline.config.options import U2PLOptions
from pipeline.ops.entropy import IGNORE
from pipeline.ops.schedules import unreliable_share


def make(case: Case) -> Step:
    """The step of a case: L_u at full resolution and, if asked for, an L_c of one drawn anchor set a class."""
    options, count = U2PLOptions(), case.shape.images
    share = unreliable_share(round(1000 * case.progress), 1000, options.alpha_0)
    keys = torch.cat([case.queue(label) for label in range(case.shape.classes)]).to(case.truth.device)

    def step(contrast: bool) -> Tensor:
        wide = _resized(case.teacher_logits[count:].float(), case.shape.large)
        share_of = wide.softmax(1)
        entropy = -(share_of * share_of.clamp_min(1e-10).log()).sum(1)
        known = case.pseudo_label != IGNORE
        gamma = torch.quantile(entropy[known], 1 - share)
        target = case.pseudo_label.where(known & (entropy < gamma), IGNORE)
        student = _resized(case.student_logits[count:], case.shape.large)
        kept = (target != IGNORE).sum()
        total = F.cross_entropy(student, target, ignore_index=IGNORE, reduction="sum")
        loss = total / kept * target.numel() / kept  # the release weighs the mean by how few pixels are kept
        return loss + _contrast(case, keys, options) if contrast else loss

    return step


def _contrast(case: Case, keys: Tensor, options: U2PLOptions) -> Tensor:
    """InfoNCE of pixels of each class against its mean teacher feature and drawn keys."""
    small = (case.shape.small, case.shape.small)
    label = F.interpolate(case.truth[:, None].float(), small)[:, 0].long().flatten()
    student, teacher = (
        features[: case.shape.images].permute(0, 2, 3, 1).flatten(0, 2)
        for features in (case.student_features, case.teacher_features)
    )
    losses = []
    for each in label.unique():
        if each == IGNORE:
            continue
        members = (label == each).nonzero()[:, 0]
        anchors = F.normalize(student[members[torch.randint(len(members), (options.anchors,))]], dim=1)
        positive = F.normalize(teacher[members].mean(0), dim=0)
        drawn = keys[torch.randint(len(keys), (options.anchors, options.negatives))]
        scores = torch.cat([(anchors @ positive)[:, None], torch.einsum("ad,and->an", anchors, drawn)], 1)
        losses.append(F.cross_entropy(scores / options.temperature, torch.zeros_like(scores[:, 0]).long()))
    return torch.stack(losses).mean()


def _resized(logits: Tensor, size: int) -> Tensor:
    return F.interpolate(logits, (size, size), mode="bilinear", align_corners=True)
