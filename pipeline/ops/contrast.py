"""U2PL's pixel contrastive loss L_c: candidate sets, prototypes and InfoNCE, for all classes at once."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.bank import MemoryBank
from pipeline.ops.losses import IGNORE
from pipeline.ops.selection import Members, rows
from pipeline.ops.world import World


class Pixels(NamedTuple):
    """What the loss knows of the n = B*h*w pixels of labeled and unlabeled images (labeled first)."""

    student: Tensor
    """float [B,D,h,w], features that get the gradient."""
    teacher: Tensor
    """float [B,D,h,w], features of prototypes and keys."""
    probability: Tensor
    """float [B,C,h,w], the teacher's softmax."""
    label: Tensor
    """int64 [B,h,w], truth or pseudo-label, 255 unknown."""
    reliable: Tensor
    """bool [B,h,w]; on labeled images: label known."""
    unreliable: Tensor
    """bool [B,h,w]; looked at on unlabeled images only."""
    labeled: Tensor
    """bool [B], which images are labeled."""


class Draws(NamedTuple):
    """Uniform numbers in [0,1) that decide the sampling; given from outside, so a test can inject its own."""

    anchors: Tensor
    """float [C,M]."""
    keys: Tensor
    """float [C,K]."""
    negatives: Tensor
    """float [C,M,N]."""


class Sets(NamedTuple):
    """Membership by class, bool [C,n]."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


def candidate_sets(pixels: Pixels, delta_p: float, r_l: int, r_h: int) -> Sets:
    """Who can be an anchor, part of the prototype, or a negative of each class (paper eq. 5, 6, 9-12).

    With O(c) the rank of class c in the teacher's probabilities (0 = most likely): anchors are reliable pixels of the
    class with p_c > delta_p; the prototype averages all reliable pixels of the class; negatives are labeled pixels of
    another class that the teacher still ranks high, O(c) < r_l, and unreliable pixels for which the class is neither
    likely nor the least likely, r_l <= O(c) < r_h.
    """
    probability = pixels.probability.detach().flatten(2)  # [B,C,n']
    classes = probability.shape[1]
    label = pixels.label.flatten(1).unsqueeze(1)
    own = label == torch.arange(classes, device=label.device).view(1, -1, 1)
    reliable = pixels.reliable.flatten(1).unsqueeze(1)
    sure = probability > delta_p
    leading = probability.topk(min(r_h, classes), dim=1).values
    likely = probability >= leading[:, r_l - 1 : r_l]
    possible = probability >= leading[:, -1:]
    of_labeled = likely & ~own & (label != IGNORE)
    of_unlabeled = pixels.unreliable.flatten(1).unsqueeze(1) & possible & ~likely
    negative = torch.where(pixels.labeled.view(-1, 1, 1), of_labeled, of_unlabeled)

    def by_class(mask: Tensor) -> Tensor:
        return mask.transpose(0, 1).flatten(1)

    return Sets(by_class(own & reliable & sure), by_class(own & reliable), by_class(negative))


def prototypes(features: Tensor, positive: Tensor) -> Tensor:
    """Mean feature of each class's positive pixels, 0 where there are none: float32 [C,D].

    Args:
        features: float [B,D,h,w] of the teacher.
        positive: bool [C, B*h*w]; a pixel belongs to one class at most.
    """
    flat = features.detach().float().flatten(2)
    member = positive.view(len(positive), *flat.shape[::2]).transpose(0, 1)  # [B,C,h*w]
    total = torch.bmm(member.to(flat.dtype), flat.transpose(1, 2)).sum(0)
    return total / positive.sum(1, keepdim=True).clamp_min(1)


class _InfoNCE(torch.autograd.Function):
    """Loss and gradient in one pass, a class at a time, so that no [C,M,N,D] tensor is kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, positives: Tensor, keys: Tensor, index: Tensor, temperature: float
    ) -> Tensor:
        losses, gradients = [], []
        norm = anchors.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        unit = anchors / norm
        for a, z, chosen in zip(unit, F.normalize(positives, dim=-1), index, strict=True):
            others = keys[chosen].to(a.dtype)  # [M,N,D]
            logits = torch.cat([(a @ z)[:, None], torch.bmm(others, a.unsqueeze(2)).squeeze(2)], 1) / temperature
            losses.append((logits.logsumexp(1) - logits[:, 0]).mean())
            share = logits.softmax(1)
            pull = (share[:, :1] - 1) * z + torch.bmm(share[:, None, 1:], others).squeeze(1)
            gradients.append((pull - a * (pull * a).sum(1, keepdim=True)) / (temperature * len(a)))
        ctx.save_for_backward(torch.stack(gradients) / norm)
        return torch.stack(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].view(-1, 1, 1), None, None, None, None


def info_nce(anchors: Tensor, positives: Tensor, keys: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Mean InfoNCE over the anchors of each class, float32 [C] (paper eq. 3).

    Args:
        anchors: float [C,M,D], gets the gradient; compared by cosine.
        positives: float [C,D], one per class.
        keys: float [rows,D], normalised bank.
        index: int64 [C,M,N], rows of `keys`: the negatives of each anchor.
        temperature: tau.
    """
    return _InfoNCE.apply(anchors.float(), positives.float(), keys, index, temperature)  # type: ignore[no-any-return]


def contrastive_loss(
    pixels: Pixels, sets: Sets, bank: MemoryBank, draws: Draws, temperature: float, world: World
) -> tuple[Tensor, Tensor]:
    """L_c of this rank, and the number of its anchor candidates by class (int64 [C]).

    New keys are pushed before the negatives are drawn. The sum over classes with anchors and keys is divided by the
    number of classes present (prototype set not empty); with at most one class present the loss is 0.
    """
    negatives = Members(sets.negative)
    key_index, valid = negatives.stratified(draws.keys)
    bank.push(rows(pixels.teacher.detach(), key_index), valid, world)
    anchors = Members(sets.anchor)
    losses = info_nce(
        rows(pixels.student, anchors.draw(draws.anchors)),
        prototypes(pixels.teacher, sets.positive),
        bank.keys,
        bank.draw(draws.negatives),
        temperature,
    )
    present = sets.positive.any(1)
    active = present & (anchors.count > 0) & (bank.count > 0)
    count = present.sum()
    loss = torch.where(active, losses, 0.0).sum() / count.clamp_min(1) * (count > 1)
    return loss, anchors.count
