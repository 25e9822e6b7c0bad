"""U2PL's losses, plainly: what each set and each term is, in the paper's order and without any speed.

`fast.py` computes the same, and tests hold it against this module. `--u2pl.parts reference` trains with this one: the
same losses up to rounding, many times slower. Equation numbers are those of the paper (Wang et al., CVPR 2022); where
paper and release differ, docs/u2pl.md says what was chosen.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.methods.u2pl.bank import MemoryBank
from pipeline.ops.entropy import IGNORE
from pipeline.ops.grid import shrink, upsample
from pipeline.ops.selection import rows
from pipeline.ops.world import World

# ---- what goes in and comes out ---------------------------------------------------------------------------------


class Reliability(NamedTuple):
    """L_u, and how it parts the unlabeled pixels."""

    loss: Tensor
    """L_u, 0-dim."""
    at: Tensor
    """float32 [K], the quantiles of the entropy that were asked for, the first one gamma_t; NaN without any pixel."""
    kept: Tensor
    """Share of the pixels that carry a pseudo-label, 0-dim."""
    label: Tensor
    """[B_u,h,w], pseudo-labels of the reliable pixels at the resolution of the features; 255 elsewhere."""
    entropy: Tensor
    """float32 [B_u,h,w], there."""
    known: Tensor
    """bool [B_u,h,w], there: whether the pixel has a label, reliable or not."""

    @property
    def reliable(self) -> Tensor:
        """Below gamma_t, bool [B_u,h,w]."""
        return self.known & (self.entropy < self.at[0])

    @property
    def unreliable(self) -> Tensor:
        """From gamma_t on, bool [B_u,h,w]."""
        return self.known & (self.entropy >= self.at[0])

    @property
    def surest(self) -> Tensor:
        """Up to the last quantile, alpha_t: bool [B_u,h,w].

        They are the "reliable" negatives of the paper's ablation (tables 4 and A2), as many as there are unreliable
        ones, and what the release calls reliable in L_c.
        """
        return self.known & (self.entropy <= self.at[-1])


class Pixels(NamedTuple):
    """What L_c knows of the n = B*h*w pixels of labeled and unlabeled images (labeled first)."""

    student: Tensor
    """float [B,D,h,w], features that get the gradient."""
    teacher: Tensor
    """float [B,D,h,w], features of prototypes and keys."""
    logits: Tensor
    """float [B,C,h,w] of the teacher."""
    label: Tensor
    """integer [B,h,w] of any dtype, truth or pseudo-label, 255 unknown."""
    reliable: Tensor
    """bool [B,h,w]: may be anchor or positive. On labeled images: label known."""
    unreliable: Tensor
    """bool [B,h,w]: may be a negative, on unlabeled images."""
    labeled: int
    """How many images are labeled; they come first."""


class Rule(NamedTuple):
    """Which pixels of which rank count; O(c) is the rank of class c in the teacher's scores, 0 the likeliest."""

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
    """What this rank's pixels give to each class."""

    anchors: Tensor
    """int64 [C,M], drawn pixels."""
    anchor_count: Tensor
    """int64 [C], pixels they were drawn from."""
    positive_sum: Tensor
    """float32 [C,D], summed teacher features of the pixels that make the prototype."""
    positive_count: Tensor
    """int64 [C], number of those pixels."""
    keys: Tensor
    """int64 [C,K], pixels that enter the bank."""
    keys_valid: Tensor
    """bool [C,K], which of them exist."""
    negative_count: Tensor
    """int64 [C], pixels that could have entered."""


class Positives(NamedTuple):
    """The positive of each class."""

    mean: Tensor
    """float32 [C,D], mean teacher feature; 0 for a class without pixels."""
    pixels: Tensor
    """float32 [C], how many pixels it is made of."""
    weight: Tensor
    """float32 [C], weight of the class's loss on this rank; 0 without anchors."""


# ---- L_u: the reliable pixels ---------------------------------------------------------------------------------


def unsupervised(
    student: Tensor, teacher: Tensor, label: Tensor, shown: Tensor, shares: Tensor, world: World, among: World
) -> Reliability:
    """L_u and the partition by gamma_t (paper eq. 3 and 5-8).

    Args:
        student: float [B_u,C,h,w], logits of the strongly augmented images; get the gradient.
        teacher: float [B_u,C,h,w], logits of the same images.
        label: int64 [B_u,H,W], pseudo-labels; 255 where there is no pixel.
        shown: bool [B_u,H,W], pixels that show an image.
        shares: float [K] in 0..1, which quantiles to take; the first one is 1 - alpha_t.
        world: ranks that share the mean of the loss.
        among: ranks that share gamma_t.
    """
    size, small = (label.shape[1], label.shape[2]), (student.shape[2], student.shape[3])
    p = upsample(teacher.float(), size).softmax(1)
    entropy = -torch.special.xlogy(p, p).sum(1)  # eq. 5: H = -sum_c p_c ln p_c
    known = label != IGNORE
    everywhere = among.gather(entropy)[among.gather(known)]
    at = torch.stack([_quantile(everywhere, share) for share in shares])
    kept = torch.where(entropy < at[0], label, IGNORE)  # eq. 6: no label from gamma_t on

    log_q = upsample(student.float(), size).log_softmax(1)
    total = F.nll_loss(log_q, kept, ignore_index=IGNORE, reduction="sum")
    reliable, pixels = (world.sum(mask.sum()).clamp_min(world.size) for mask in (kept != IGNORE, shown))
    mean = total * world.size / reliable  # this rank's share of the mean over all ranks
    loss = mean * pixels / reliable  # lambda_u, eq. 8: the fewer are reliable, the more each counts
    return Reliability(
        loss, at, (kept != IGNORE).float().mean(), shrink(kept, small), shrink(entropy, small),
        shrink(known, small),
    )  # fmt: skip


def _quantile(values: Tensor, share: Tensor) -> Tensor:
    """With linear interpolation, NaN of no values; `torch.quantile` takes no more than 2^24."""
    if not len(values):
        return values.new_full((), torch.nan)
    ordered, place = values.sort().values.double(), share.double() * (len(values) - 1)
    below, above = ordered[place.floor().long()], ordered[place.ceil().long()]
    return torch.lerp(below, above, place - place.floor()).float()


# ---- L_c: anchors, positives, negatives -------------------------------------------------------------------------


class Sets(NamedTuple):
    """Membership by class, bool [C,n]."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


def sets(pixels: Pixels, rule: Rule) -> Sets:
    """Who is what for class c (paper eq. 9-16).

    The positive averages the reliable pixels of the class; anchors are those of them with p_c > delta_p. Negatives are
    labeled pixels of another class that the teacher still ranks high, O(c) < r_l, and unreliable pixels for which the
    class is neither likely nor the least likely, r_l <= O(c) < r_h.
    """
    p = rows(pixels.logits.detach().float()).softmax(1)  # [n,C]
    label, reliable, unreliable = pixels.label.flatten(), pixels.reliable.flatten(), pixels.unreliable.flatten()
    of_labeled = torch.arange(len(label), device=label.device) < pixels.labeled * pixels.label[0].numel()
    found: list[Sets] = []
    for c in range(p.shape[1]):
        rank = (p > p[:, c, None]).sum(1)  # O(c), eq. 13
        positive = (label == c) & reliable  # eq. 9 and 10, without delta_p
        anchor = positive & (p[:, c] > rule.delta_p)  # eq. 11
        truth = of_labeled & (label != IGNORE) & (label != c) & (rank < rule.r_l)  # eq. 14
        doubtful = ~of_labeled & unreliable & (rule.r_l <= rank) & (rank < rule.r_h)  # eq. 15
        found.append(Sets(anchor, positive, truth | doubtful))
    return Sets(*(torch.stack(masks) for masks in zip(*found, strict=True)))


def candidates(pixels: Pixels, rule: Rule, draws: Draws) -> Candidates:
    """Draws from these sets: anchors with replacement, keys for the bank without, evenly over the set."""
    who, teacher = sets(pixels, rule), rows(pixels.teacher.detach()).float()
    anchors, keys = (torch.zeros_like(uniform, dtype=torch.int64) for uniform in (draws.anchors, draws.keys))
    valid = torch.zeros_like(keys, dtype=torch.bool)
    for c in range(len(who.anchor)):
        members = who.anchor[c].nonzero().flatten()
        if len(members):
            anchors[c] = members[(draws.anchors[c] * len(members)).long().clamp_max(len(members) - 1)]
        chosen = _spread(who.negative[c].nonzero().flatten(), draws.keys[c])
        keys[c, : len(chosen)], valid[c, : len(chosen)] = chosen, True
    sums = torch.stack([teacher[member].sum(0) for member in who.positive])
    anchor_count, positive_count, negative_count = (mask.sum(1) for mask in who)
    return Candidates(anchors, anchor_count, sums, positive_count, keys, valid, negative_count)


def _spread(members: Tensor, uniform: Tensor) -> Tensor:
    """All members if they are no more than `uniform` [K], else one of each of K parts of equal size."""
    if len(members) <= len(uniform):
        return members
    bounds = torch.arange(len(uniform) + 1, device=members.device) * len(members) // len(uniform)
    length = bounds.diff()
    return members[bounds[:-1] + torch.minimum((uniform * length).long(), length - 1)]


def positives(found: Candidates, world: World) -> Positives:
    """z_c^+, the mean teacher feature of a class over all ranks (paper eq. 12).

    A rank's weight is its share of the class's anchors, relative to the mean: the expectation of the loss does not
    depend on the number of ranks.
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
    """L_c (paper eq. 4): each anchor is pulled to its class's positive and pushed from keys of the class's queue.

    New keys enter before the negatives are drawn. Classes without anchors or keys add nothing; the sum is divided by
    the classes that have a positive, and with fewer than two of those it is 0. `binary`: L_b, our derivation.
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
