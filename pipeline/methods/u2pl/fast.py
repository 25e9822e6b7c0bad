"""U2PL's losses, optimised. They equal those of `reference.py`, which is the listing to read.

No logits at full size, one sort for anchors and prototypes, no host synchronisation, loss and gradient in one pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.methods.u2pl.bank import MemoryBank
from pipeline.methods.u2pl.reference import Candidates, Draws, Pixels, Positives, Reliability, Rule
from pipeline.ops.entropy import IGNORE, masked_quantile
from pipeline.ops.grid import make_grid
from pipeline.ops.kernel import is_active, kernel
from pipeline.ops.losses import unsupervised_cross_entropy
from pipeline.ops.selection import Members, Segments, rows, take
from pipeline.ops.world import World

# ---- L_u: the reliable pixels ---------------------------------------------------------------------------------


def unsupervised(
    student: Tensor, teacher: Tensor, label: Tensor, shown: Tensor, shares: Tensor, world: World, among: World
) -> Reliability:
    """L_u and the partition by gamma_t; arguments as in `reference`."""
    grid = make_grid((label.shape[1], label.shape[2]), (student.shape[2], student.shape[3]))
    arranged = grid.arrange(label)
    values, known = grid.entropy(teacher), arranged != IGNORE
    thresholds = masked_quantile(values, known, shares, among)
    target = reliable_labels(values, arranged, thresholds[0])
    loss = unsupervised_cross_entropy(student, target, shown, world, grid)
    kept_share = (target != IGNORE).sum() / label.numel()
    return Reliability(loss, thresholds, kept_share, grid.shrink(target), grid.shrink(values), grid.shrink(known))


@kernel()
def reliable_labels(values: Tensor, label: Tensor, gamma: Tensor) -> Tensor:
    """Labels of the pixels whose entropy is below gamma_t, 255 elsewhere: of the shape and dtype of `label`.

    Args:
        values: float32, entropy.
        label: of the same shape, pseudo-labels.
        gamma: float32 0-dim, gamma_t; NaN leaves no label.
    """
    reliable = (values < gamma).to(label.dtype)
    return label * reliable + IGNORE * (1 - reliable)


# ---- L_c: anchors, positives, negatives ------------------------------------------------------------------------------


def candidates(pixels: Pixels, rule: Rule, draws: Draws) -> Candidates:
    """Chooses anchors, positives and new keys as `reference.sets` and `reference.candidates` define them."""
    classes = pixels.logits.shape[1]
    label, logits = pixels.label.float(), pixels.logits.detach().float()
    by_class = Segments(_anchor_set(logits, label, pixels.may_be_anchor, rule.delta_p).flatten(), 2 * classes)
    count = by_class.count.view(classes, 2)
    sums = by_class.sums(rows(pixels.teacher.detach())).unflatten(0, (classes, 2))
    members = Members(negative_mask(pixels, rule))
    keys, valid = members.stratified(draws.keys)
    # the even sets hold the pixels that may be anchors
    anchors = by_class.draw(draws.anchors.repeat_interleave(2, 0))[::2]
    return Candidates(anchors, count[:, 0], sums.sum(1), count.sum(1), keys, valid, members.count)


@kernel()
def _anchor_set(logits: Tensor, label: Tensor, may_be_anchor: Tensor, delta_p: float) -> Tensor:
    """Number of each pixel's set, int16 [B,h,w]: 2c, anchors of class c; 2c+1, its other positives; 2C, neither."""
    classes = logits.shape[1]
    own = label.unsqueeze(1) == torch.arange(classes, device=logits.device, dtype=logits.dtype).view(-1, 1, 1)
    weights = (logits - logits.amax(1, keepdim=True)).exp()
    probability = (weights * own.float()).sum(1) / weights.sum(1)
    member = may_be_anchor.float() * (label != IGNORE).float()
    number = 2.0 * label + (1.0 - (probability > delta_p).float())  # NaN is not above delta_p
    return (member * number + (1.0 - member) * (2.0 * classes)).to(torch.int16)


def negative_mask(pixels: Pixels, rule: Rule) -> Tensor:
    """Which pixels are negatives of which class: uint8 [C,n], 0 or 1."""
    logits = pixels.logits.detach().float()
    likely, possible = kth_largest(logits, rule.r_l), kth_largest(logits, min(rule.r_h, logits.shape[1]))
    label = pixels.label.float()
    labeled = (torch.arange(len(label), device=label.device) < pixels.labeled).float().view(-1, 1, 1)
    truth, unlabeled = labeled * (label != IGNORE).float(), (1.0 - labeled) * pixels.may_be_negative.float()
    return _negatives(logits, likely, possible, label, truth, unlabeled).flatten(1)


@kernel()
def _negatives(
    logits: Tensor, likely: Tensor, possible: Tensor, label: Tensor, truth: Tensor, unlabeled: Tensor
) -> Tensor:
    """Which pixels are negatives of which class, uint8 [C,B,h,w].

    Masks are floats of 0 and 1, and products stand in place of logic: mixed types do not vectorise.

    Args:
        logits: float32 [B,C,h,w] of the teacher.
        likely: float32 [B,h,w], least logit of a class with O(c) < r_l.
        possible: float32 [B,h,w], least logit of a class with O(c) < r_h.
        label: float32 [B,h,w].
        truth: float32 [B,h,w], pixels of labeled images that have a label.
        unlabeled: float32 [B,h,w], pixels of unlabeled images that may be negatives.
    """
    by_class = logits.transpose(0, 1)
    classes = torch.arange(len(by_class), device=logits.device, dtype=logits.dtype).view(-1, 1, 1, 1)
    leading = (by_class >= likely).float()
    of_labeled = leading * (label != classes).float() * truth
    of_unlabeled = (1.0 - leading) * (by_class >= possible).float() * unlabeled
    return (of_labeled + of_unlabeled).to(torch.uint8)


_NETWORK = 512
"""Comparisons up to which an unrolled insertion beats `topk`."""


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest (1 = largest) along dim 1: float [B,C,h,w] -> [B,h,w]."""
    classes = values.shape[1]
    if classes * min(k, classes + 1 - k) > _NETWORK:
        return values.topk(k, dim=1).values[:, -1]
    return _largest(values, k) if 2 * k <= classes + 1 else -_largest(-values, classes + 1 - k)


@kernel()
def _largest(values: Tensor, k: int) -> Tensor:
    """As `kth_largest`, for small k: every class in turn is inserted into the k largest so far."""
    best: list[Tensor] = []
    for value in values.unbind(1):
        for i, held in enumerate(best):
            best[i], value = torch.maximum(held, value), torch.minimum(held, value)
        if len(best) < k:
            best.append(value)
    return best[-1]


def positives(found: Candidates, world: World) -> Positives:
    """As `reference.positives`, with one collective, whatever the number of classes.

    The weight is this worker's number of anchor candidates relative to the mean per worker: the mean over the workers
    then has the expectation of one draw from all candidates.
    """
    local = torch.cat([found.positive_sum, found.positive_count[:, None], found.anchor_count[:, None]], 1)
    total = world.sum(local)
    count, anchors = total[:, -2], total[:, -1]
    weight = found.anchor_count * world.size / anchors.clamp_min(1)
    return Positives(total[:, :-2] / count.clamp_min(1)[:, None], count, weight)


def contrastive(
    pixels: Pixels,
    found: Candidates,
    positive: Positives,
    bank: MemoryBank,
    draws: Draws,
    temperature: float,
    world: World,
    *,
    binary: bool = False,
) -> Tensor:
    """L_c (or L_b) of this worker, 0-dim; its mean over the workers has the same expectation for any number of them.

    New keys are pushed before the negatives are drawn. The sum over classes with anchors and keys is divided by the
    number of classes present (prototype set not empty); with at most one class present the loss is 0.
    """
    bank.push(take(rows(pixels.teacher.detach()), found.keys), found.keys_valid, world)
    sharing = found.anchors.shape[1] // draws.negatives.shape[1]
    losses = info_nce(
        take(rows(pixels.student), found.anchors),
        positive.mean,
        bank.keys,
        bank.draw(draws.negatives).repeat_interleave(sharing, 1),
        temperature,
        binary=binary,
    )
    weight = torch.where(bank.count > 0, positive.weight, 0.0)
    present = (positive.pixels > 0).sum()
    return (losses * weight).sum() / present.clamp_min(1) * (present > 1)


# ---- InfoNCE: loss and gradient in one pass ---------------------------------------------------------------------


def info_nce(
    anchors: Tensor, positives: Tensor, keys: Tensor, index: Tensor, temperature: float, *, binary: bool = False
) -> Tensor:
    """Mean loss over the anchors of each class, float32 [C].

    With s = cosine / temperature, to the positive and to the N negatives of an anchor:
    -log(exp(s+) / (exp(s+) + sum exp(s-))), the paper's eq. 4; or, binary, softplus(-s+) + mean softplus(s-), which
    the paper's L_b is taken to mean (it is called in the release and defined nowhere).

    Args:
        anchors: float [C,M,D], get the gradient; compared by cosine.
        positives: float [C,D], one per class.
        keys: float [rows,D], the bank's normalised keys.
        index: int64 [C,M,N], rows of `keys`: the negatives of each anchor. Anchors may share them. That is faster, as
            caches hold shared keys; it does not change the expectation of loss and gradient, and adds noise to both.
        temperature: tau.
        binary: whether to compute the second one.
    """
    return _InfoNCE.apply(  # type: ignore[no-any-return]
        anchors.float(), positives.float(), keys, index, temperature, binary
    )


_SHORT = 1e-8
"""Length below which a vector counts as 0."""


class _InfoNCE(torch.autograd.Function):
    """Keeps the gradient [C,M,D] for the backward, and nothing of the size of the negatives."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, positives: Tensor, keys: Tensor, index: Tensor, temperature: float, binary: bool
    ) -> Tensor:
        """Losses [C]. Saves their gradient for the anchors, float32 [C,M,D]."""
        unit, norm, positive = _normalised(anchors, positives)
        losses, slope_own, slope_others = _loss((unit * positive).sum(-1), dots(unit, keys, index), temperature, binary)
        pull = slope_own[..., None] * positive + _combined(slope_others, keys, index)
        ctx.save_for_backward(_tangent(pull, unit, norm))
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:  # type: ignore[override]
        """The saved gradient, times that of each class's loss [C]; positives and keys get none."""
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].view(-1, 1, 1), None, None, None, None, None


@kernel()
def _normalised(anchors: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit anchors [C,M,D], their lengths [C,M,1], unit positives [C,1,D]."""
    norm = anchors.norm(dim=-1, keepdim=True).clamp_min(_SHORT)
    return anchors / norm, norm, F.normalize(positives, dim=-1)[:, None]


@kernel()
def _loss(own: Tensor, others: Tensor, temperature: float, binary: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [C], and its derivative by each cosine: to the positive [C,M] and to the negatives [C,M,N]."""
    own, others = own / temperature, others / temperature
    share = 1.0 / (temperature * own.shape[1])
    if binary:
        losses = F.softplus(-own) + F.softplus(others).mean(-1)
        return losses.mean(1), (own.sigmoid() - 1) * share, others.sigmoid() * (share / others.shape[2])
    largest = torch.maximum(own, others.amax(-1))
    first, rest = (own - largest).exp(), (others - largest[..., None]).exp()
    total = first + rest.sum(-1)
    losses = largest + total.log() - own
    return losses.mean(1), (first / total - 1) * share, rest * (share / total)[..., None]


@kernel()
def _tangent(pull: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """The gradient of a cosine has no part along the anchor; an anchor of length 0 has no direction and gets none."""
    return torch.where(norm > _SHORT, (pull - unit * (pull * unit).sum(-1, keepdim=True)) / norm, 0.0)


def dots(unit: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """Cosines of anchors and negatives: [C,M,D], [rows,D], [C,M,N] -> float32 [C,M,N]."""
    if is_active():
        return gathered_dots(unit, keys, index)
    classes = zip(unit, index, strict=True)  # one class at a time: all negatives at once are [C,M,N,D]
    return torch.stack([torch.bmm(keys[rows].float(), a.unsqueeze(2)).squeeze(2) for a, rows in classes])


@kernel()
def gathered_dots(unit: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """As `dots`, reading each negative from the bank without a copy: compiled, there is no [C,M,N,D]."""
    return (unit[:, :, None] * keys[index]).sum(-1)


def _combined(weights: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """Weighted sums of each anchor's negatives: [C,M,N], [rows,D], [C,M,N] -> float32 [C,M,D]."""
    weights = weights.flatten(0, 1).to(keys.dtype)
    bags = F.embedding_bag(index.flatten(0, 1), keys, mode="sum", per_sample_weights=weights)
    return bags.float().unflatten(0, index.shape[:2])
