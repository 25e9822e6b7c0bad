"""U2PL's losses, written plainly: every set and every term, in the paper's order, for reading and not for speed.

`fast.py` computes the same, and tests hold it against this module. `--u2pl.parts reference` trains with this one: the
same losses up to rounding, many times slower. Equation numbers are those of the CVPR 2022 paper (Wang et al.) as
remembered: compare the formula, not the number. Where paper and release differ, docs/u2pl.md says what was chosen.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.methods.u2pl.bank import MemoryBank
from pipeline.ops.entropy import IGNORE, quantile
from pipeline.ops.grid import shrink, upsample
from pipeline.ops.selection import rows
from pipeline.ops.world import World

# ---- what goes in and comes out ---------------------------------------------------------------------------------


class Reliability(NamedTuple):
    """L_u, and the partition of the unlabeled pixels by their entropy."""

    loss: Tensor
    """L_u, 0-dim."""
    thresholds: Tensor
    """float32 [1 or 2], quantiles of the entropy: gamma_t, and the alpha_t quantile if asked for; NaN of no pixels."""
    kept_share: Tensor
    """Share of the pixels that carry a pseudo-label, float32, 0-dim."""
    label: Tensor
    """[B_u,h,w], pseudo-labels of the reliable pixels at the resolution of the features; 255 elsewhere."""
    entropy: Tensor
    """float32 [B_u,h,w], entropy at the resolution of the features."""
    known: Tensor
    """bool [B_u,h,w] at the resolution of the features: whether the pixel has a pseudo-label, reliable or not."""

    @property
    def reliable(self) -> Tensor:
        """Pixels with an entropy below gamma_t, bool [B_u,h,w]."""
        return self.known & (self.entropy < self.thresholds[0])

    @property
    def unreliable(self) -> Tensor:
        """Pixels with an entropy of gamma_t or more, bool [B_u,h,w]."""
        return self.known & (self.entropy >= self.thresholds[0])

    @property
    def surest(self) -> Tensor:
        """The alpha_t share of the pixels with the lowest entropy, bool [B_u,h,w].

        They are the "reliable" negatives of the paper's ablation (tables 4 and A2), as many as there are unreliable
        ones, and what the release calls reliable in L_c.

        Raises:
            ValueError: their threshold was not asked for.
        """
        if len(self.thresholds) < 2:
            raise ValueError("surest needs the alpha_t quantile as second threshold")
        return self.known & (self.entropy <= self.thresholds[1])


class Pixels(NamedTuple):
    """The n = B*h*w pixels of labeled and unlabeled images (labeled first), as L_c sees them."""

    student: Tensor
    """float [B,D,h,w], features that get the gradient."""
    teacher: Tensor
    """float [B,D,h,w], features of prototypes and keys."""
    logits: Tensor
    """float [B,C,h,w] of the teacher."""
    label: Tensor
    """integer [B,h,w] of any dtype, truth or pseudo-label, 255 unknown."""
    may_be_anchor: Tensor
    """bool [B,h,w]: the pixel may be anchor or positive of the class in `label`. The paper: the reliable pixels of
    unlabeled images, and all pixels of labeled ones that have a label."""
    may_be_negative: Tensor
    """bool [B,h,w]: the pixel may be a negative. The paper: the unreliable pixels of unlabeled images; what stands for
    labeled images is not read."""
    labeled: int
    """How many images are labeled; they come first."""


class Rule(NamedTuple):
    """Limits of anchors and negatives. O(c), the class rank, is the place of c among the classes, 0 the likeliest."""

    delta_p: float
    """Anchors are pixels whose own class has more than this probability."""
    r_l: int
    """Classes with O(c) < r_l are likely."""
    r_h: int
    """Classes with O(c) >= r_h are so unlikely that the pixel teaches nothing."""


class Draws(NamedTuple):
    """Uniform numbers in [0,1) that decide the sampling; given from outside, so a test can inject its own."""

    anchors: Tensor
    """float [C,M]."""
    keys: Tensor
    """float [C,K]."""
    negatives: Tensor
    """float [C,G,N]: N negatives for each of G groups of neighbouring anchors; G = M is the paper's."""


class Candidates(NamedTuple):
    """Anchors, prototype sums and new keys of each class, from the pixels of this worker."""

    anchors: Tensor
    """int64 [C,M], indices of the drawn pixels."""
    anchor_count: Tensor
    """int64 [C], number of pixels that anchors were drawn from."""
    positive_sum: Tensor
    """float32 [C,D], summed teacher features of the pixels that make the prototype."""
    positive_count: Tensor
    """int64 [C], number of those pixels."""
    keys: Tensor
    """int64 [C,K], indices of the pixels that enter the bank."""
    keys_valid: Tensor
    """bool [C,K], which of them exist."""
    negative_count: Tensor
    """int64 [C], number of pixels that keys were drawn from."""


class Positives(NamedTuple):
    """The positive of each class."""

    mean: Tensor
    """float32 [C,D], mean teacher feature; 0 for a class without pixels."""
    pixels: Tensor
    """float32 [C], number of pixels in that mean."""
    weight: Tensor
    """float32 [C], weight of the class's loss on this worker; 0 without anchors."""


# ---- L_u: the reliable pixels ---------------------------------------------------------------------------------


def unsupervised(
    student: Tensor, teacher: Tensor, label: Tensor, shown: Tensor, shares: Tensor, world: World, among: World
) -> Reliability:
    """L_u and the partition by gamma_t (paper eq. 3 and 5 to 8).

    Args:
        student: float [B_u,C,h,w], logits of the strongly augmented images; get the gradient.
        teacher: float [B_u,C,h,w], logits of the same images.
        label: int64 [B_u,H,W], pseudo-labels; 255 where there is no pixel.
        shown: bool [B_u,H,W], pixels that show an image.
        shares: float [1 or 2] in 0..1, which quantiles to take: 1 - alpha_t, then alpha_t where `surest` is used.
        world: workers that share the mean of the loss.
        among: workers that share gamma_t.
    """
    size, small = (label.shape[1], label.shape[2]), (student.shape[2], student.shape[3])
    p = upsample(teacher.float(), size).softmax(1)
    entropy = -torch.special.xlogy(p, p).sum(1)  # eq. 5: H = -sum_c p_c ln p_c
    known = label != IGNORE
    everywhere = among.gather(entropy)[among.gather(known)]
    thresholds = torch.stack([quantile(everywhere, share) for share in shares])
    target = torch.where(entropy < thresholds[0], label, IGNORE)  # eq. 6: no label from gamma_t on

    log_q = upsample(student.float(), size).log_softmax(1)
    total = F.nll_loss(log_q, target, ignore_index=IGNORE, reduction="sum")
    reliable, pixels = (world.sum(mask.sum()).clamp_min(world.size) for mask in (target != IGNORE, shown))
    mean = total * world.size / reliable  # this worker's share of the mean over all workers
    loss = mean * pixels / reliable  # lambda_u of eq. 8 (with eta = 1): the fewer are reliable, the more each counts
    return Reliability(
        loss, thresholds, (target != IGNORE).float().mean(), shrink(target, small), shrink(entropy, small),
        shrink(known, small),
    )  # fmt: skip


# ---- L_c: anchors, positives, negatives -------------------------------------------------------------------------


class Sets(NamedTuple):
    """Which of the n pixels play which part for each class."""

    anchor: Tensor
    """bool [C,n]."""
    positive: Tensor
    """bool [C,n], the pixels that the prototype averages."""
    negative: Tensor
    """bool [C,n], the pixels that may enter the class's memory bank."""


def sets(pixels: Pixels, rule: Rule) -> Sets:
    """Anchors, positives and negatives of each class (paper eq. 9 to 11 and 13 to 16).

    The prototype of class c averages the pixels of the class that may be anchors, as in the release; anchors are those
    of them with p_c > delta_p. Negatives are labeled pixels of another class to which the teacher still gives a high
    rank, O(c) < r_l, and unlabeled pixels that may be negatives and for which the class is neither likely nor the least
    likely, r_l <= O(c) < r_h.
    """
    p = rows(pixels.logits.detach().float()).softmax(1)  # [n,C]
    label = pixels.label.flatten()
    may_be_anchor, may_be_negative = pixels.may_be_anchor.flatten(), pixels.may_be_negative.flatten()
    of_labeled = torch.arange(len(label), device=label.device) < pixels.labeled * pixels.label[0].numel()
    found: list[Sets] = []
    for c in range(p.shape[1]):
        class_rank = (p > p[:, c, None]).sum(1)  # O(c), eq. 13
        positive = (label == c) & may_be_anchor  # the release's: eq. 9 to 11 without delta_p
        anchor = positive & (p[:, c] > rule.delta_p)  # eq. 9 to 11
        likely = of_labeled & (label != IGNORE) & (label != c) & (class_rank < rule.r_l)  # eq. 14
        unlikely = ~of_labeled & may_be_negative & (rule.r_l <= class_rank) & (class_rank < rule.r_h)  # eq. 15
        found.append(Sets(anchor, positive, likely | unlikely))  # eq. 16
    return Sets(*(torch.stack(masks) for masks in zip(*found, strict=True)))


def candidates(pixels: Pixels, rule: Rule, draws: Draws) -> Candidates:
    """Draws from `sets`: anchors with replacement; keys for the bank without, spread evenly over the set."""
    who, teacher = sets(pixels, rule), rows(pixels.teacher.detach()).float()
    anchors, keys = (torch.zeros_like(uniform, dtype=torch.int64) for uniform in (draws.anchors, draws.keys))
    valid = torch.zeros_like(keys, dtype=torch.bool)
    for c in range(len(who.anchor)):
        members = who.anchor[c].nonzero().flatten()
        if len(members):
            anchors[c] = members[(draws.anchors[c] * len(members)).long().clamp_max(len(members) - 1)]
        chosen = _stratified(who.negative[c].nonzero().flatten(), draws.keys[c])
        keys[c, : len(chosen)], valid[c, : len(chosen)] = chosen, True
    sums = torch.stack([teacher[member].sum(0) for member in who.positive])
    anchor_count, positive_count, negative_count = (mask.sum(1) for mask in who)
    return Candidates(anchors, anchor_count, sums, positive_count, keys, valid, negative_count)


def _stratified(members: Tensor, uniform: Tensor) -> Tensor:
    """All members int64 [n] if n <= K, else one from each of K equal strata, drawn by `uniform` [K] in [0,1).

    As `ops.selection.Members.stratified`.
    """
    if len(members) <= len(uniform):
        return members
    bounds = torch.arange(len(uniform) + 1, device=members.device) * len(members) // len(uniform)
    length = bounds.diff()
    return members[bounds[:-1] + torch.minimum((uniform * length).long(), length - 1)]


def positives(found: Candidates, world: World) -> Positives:
    """z_c^+, the mean teacher feature of a class over all workers.

    It is the paper's eq. 12, but over all reliable pixels of the class, as in the release, and not over its anchors
    alone. A worker's weight is its number of the class's anchors, relative to the mean per worker: so the expectation
    of the loss does not depend on the number of workers.
    """
    pixels, anchors = world.sum(found.positive_count), world.sum(found.anchor_count)
    mean = world.sum(found.positive_sum) / pixels.clamp_min(1)[:, None]
    return Positives(mean, pixels.float(), found.anchor_count * world.size / anchors.clamp_min(1))


def averaged(previous: Tensor, current: Positives, decay: Tensor) -> Tensor:
    """Prototypes smoothed over the steps: decay * previous + (1 - decay) * mean where the class is present, [C,D]."""
    return torch.where(current.pixels[:, None] > 0, torch.lerp(current.mean, previous, decay), previous)


def contrastive(
    pixels: Pixels, found: Candidates, positive: Positives, bank: MemoryBank, draws: Draws, temperature: float,
    world: World, *, binary: bool = False,
) -> Tensor:  # fmt: skip
    """L_c (paper eq. 4), 0-dim: anchors are pulled to the positive of their class and pushed from keys of its queue.

    New keys enter the bank before the negatives are drawn. Classes without anchors or keys add nothing; the sum is
    divided by the number of classes that have a positive, and is 0 with fewer than two of those. `binary` computes L_b
    instead, our derivation (docs/u2pl.md).
    """
    student, teacher = rows(pixels.student).float(), rows(pixels.teacher.detach())
    bank.push(teacher[found.keys], found.keys_valid, world)
    present, total = positive.pixels > 0, pixels.student.sum() * 0.0
    drawn = bank.draw(draws.negatives)
    sharing = found.anchors.shape[1] // draws.negatives.shape[1]
    for c in range(len(present)):
        if found.anchor_count[c] and bank.count[c]:
            anchor = student[found.anchors[c]]  # [M,D]
            own = F.cosine_similarity(anchor, positive.mean[c][None], dim=-1) / temperature  # [M]
            negative = bank.keys[drawn[c].repeat_interleave(sharing, 0)].float()  # [M,N,D]
            others = F.cosine_similarity(anchor[:, None], negative, dim=-1) / temperature  # [M,N]
            if binary:
                losses = F.softplus(-own) + F.softplus(others).mean(1)
            else:
                losses = torch.cat([own[:, None], others], 1).logsumexp(1) - own
            total = total + positive.weight[c] * losses.mean()
    return total / present.sum().clamp_min(1) * (present.sum() > 1)
