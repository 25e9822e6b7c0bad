"""The release's defects against slow loops of their description."""

import pytest
import torch
from torch import Tensor

from pipeline.methods.u2pl import reference, upstream
from pipeline.methods.u2pl.bank import MemoryBank
from pipeline.methods.u2pl.fast import contrastive
from pipeline.methods.u2pl.reference import Candidates, Draws, Pixels, Positives, Rule
from pipeline.ops.entropy import masked_quantile
from pipeline.ops.selection import Members, rows
from pipeline.ops.world import World
from tests.unit.methods.u2pl.banks import ordered
from tests.unit.methods.u2pl.scenes import C, D, H, W, drawn, info_nce, places, scene, split
from tests.unit.ops.worlds import on_ranks

RULE = Rule(0.3, 2, 4)


def _labels(images: int, classes: int = C, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    label = torch.randint(0, classes, (images, H, W))
    return label.masked_fill(torch.rand(label.shape) < 0.25, 255)


# ---- D1 ---------------------------------------------------------------------------------------------------------


def _slow_one_hot(label: Tensor, classes: int) -> Tensor:
    """All labels land in image 0; 255 elsewhere is class 0 there, 255 in image 0 clears the pixel."""
    found = torch.zeros(len(label), classes, *label.shape[1:], dtype=torch.bool)
    for b, y, x in places(label):
        value = int(label[b, y, x])
        found[0, 0 if value == 255 else value, y, x] = True
    for _, y, x in places(label[:1]):
        if label[0, y, x] == 255:
            found[0, :, y, x] = False
    return found


@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_one_hot_puts_all_labels_into_the_first_image(images):
    label = _labels(images)
    found = upstream.one_hot(label, C)
    assert found.dtype == torch.bool
    assert torch.equal(found, _slow_one_hot(label, C))
    assert not found[1:].any()


def test_one_hot_is_that_of_the_releases_scatter():
    label = _labels(4, seed=1)
    scattered = torch.zeros(C, 4, H, W).scatter_(0, label.masked_fill(label == 255, 0).unsqueeze(1), 1.0)
    scattered[:, label == 255] = 0
    assert torch.equal(upstream.one_hot(label, C), scattered.transpose(0, 1).bool())


def test_one_image_has_its_right_one_hot():
    label = _labels(1)
    assert torch.equal(upstream.one_hot(label, C)[0], label[0] == torch.arange(C).view(-1, 1, 1))


# ---- D2 ---------------------------------------------------------------------------------------------------------


def _own(pixels: Pixels, right: bool = False) -> Tensor:
    """Which labels each pixel carries, by the release's one-hot or a right one: bool [B,C,h,w]."""
    if right:
        return pixels.label.unsqueeze(1) == torch.arange(C).view(-1, 1, 1)
    halves = pixels.label[: pixels.labeled], pixels.label[pixels.labeled :]
    return torch.cat([_slow_one_hot(half, C) for half in halves])


def _slow_sets(pixels: Pixels, own: Tensor, rule: Rule) -> reference.Sets:
    found = reference.Sets(*(torch.zeros(C, pixels.label.numel(), dtype=torch.bool) for _ in range(3)))
    for n, (b, y, x) in enumerate(places(pixels.label)):
        p = pixels.logits[b, :, y, x].double().softmax(0)
        for c in range(C):
            rank, carries = int((p > p[c]).sum()), bool(own[b, c, y, x])
            found.positive[c, n] = carries and bool(pixels.may_be_anchor[b, y, x])
            found.anchor[c, n] = bool(found.positive[c, n]) and bool(p[c] > rule.delta_p)
            unreliable = b >= pixels.labeled and bool(pixels.may_be_negative[b, y, x])
            found.negative[c, n] = carries and unreliable and rule.r_l <= rank < rule.r_h
    return found


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("rule", [RULE, Rule(0.3, 1, 2), Rule(0.1, 3, 20), Rule(0.3, 1, 5)], ids=str)
def test_masks_are_the_releases(rule, right):
    pixels = scene()
    own = _own(pixels, right)
    for found, expected in zip(upstream.masks(pixels, own, rule), _slow_sets(pixels, own, rule), strict=True):
        assert torch.equal(found, expected)
        assert expected.any()


def test_labeled_pixels_are_never_negatives():
    pixels = scene()._replace(labeled=3)
    sets = upstream.masks(pixels, torch.ones(3, C, H, W, dtype=torch.bool), RULE)
    assert not sets.negative.any()


@pytest.mark.parametrize("labels", [None, (1, 3)])
def test_candidates_are_drawn_from_the_masks(labels):
    pixels = scene(labels=labels)
    own, draws = _own(pixels), Draws(torch.rand(C, 6), torch.rand(C, 8), torch.rand(C, 6, 5))
    sets = _slow_sets(pixels, own, RULE)
    found = upstream.candidates(pixels, own, RULE, draws)
    for count, mask in zip((found.anchor_count, found.positive_count, found.negative_count), sets, strict=True):
        assert torch.equal(count, mask.sum(1))
    keys, valid = Members(sets.negative).stratified(draws.keys)
    assert torch.equal(found.keys_valid, valid)
    assert torch.equal(found.keys[valid], keys[valid])
    for c in range(C):
        expected = rows(pixels.teacher).double()[sets.positive[c]].sum(0)
        torch.testing.assert_close(found.positive_sum[c].double(), expected, rtol=1e-5, atol=1e-5)
        if sets.anchor[c].any():
            assert found.anchors[c].tolist() == drawn(sets.anchor[c], draws.anchors[c])


def test_prototypes_are_means_of_one_rank():
    pixels = scene(labels=(1, 3))
    pixels.logits[:, 3] = -9.0  # present, without anchors
    own = _own(pixels, right=True)
    found = upstream.candidates(pixels, own, RULE, Draws(torch.rand(C, 6), torch.rand(C, 8), torch.rand(C, 6, 5)))
    positive = upstream.positives(found)
    sets = _slow_sets(pixels, own, RULE)
    torch.testing.assert_close(positive.mean[1], rows(pixels.teacher)[sets.positive[1]].mean(0), rtol=1e-5, atol=1e-6)
    assert positive.weight.tolist() == [0, 1, 0, 0, 0]
    assert positive.pixels.tolist() == sets.positive.sum(1).tolist()
    assert not positive.mean[[0, 2, 4]].any()


# ---- D3 ---------------------------------------------------------------------------------------------------------


def _simple(present: list[int], anchors: list[int]) -> tuple[Candidates, Positives]:
    """Classes told apart by their numbers; `anchors` are those that have any."""
    ids = torch.arange(C)
    has = torch.tensor([float(c in anchors) for c in range(C)])
    nothing = torch.zeros(C, 0, dtype=torch.long)
    found = Candidates(ids[:, None].expand(-1, 2), has.long(), torch.zeros(C, D), has.long(), nothing, nothing > 0, ids)
    pixels = torch.tensor([3.0 * (c in present) for c in range(C)])
    return found, Positives(ids[:, None].float().expand(-1, D), pixels, has)


@pytest.mark.parametrize(
    ("present", "anchors"),
    [
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ([1, 3, 4], [1, 3, 4]),
        ([0, 2, 4], [0, 2]),
        ([4], [4]),
        ([], []),
        ([2, 3], [3]),
    ],
)
def test_the_bank_of_the_ith_class_present_meets_the_anchors_of_class_i(present, anchors):
    found, positive = upstream.mispaired(*_simple(present, anchors))
    for i, c in enumerate(present):
        assert found.anchors[c].tolist() == [i, i]
        assert positive.mean[c].tolist() == [i] * D
        assert positive.weight[c] == (i in anchors)
    absent = [c for c in range(C) if c not in present]
    assert not positive.weight[absent].any()
    assert positive.pixels.bool().tolist() == [c in present for c in range(C)]


def _slow_loss(pixels: Pixels, sets: reference.Sets, draws: Draws, bank: MemoryBank) -> Tensor:
    """As the release words it: a loop over the list of classes present, whose position serves as a class id."""
    student, teacher = rows(pixels.student), rows(pixels.teacher)
    valid = [c for c in range(C) if sets.positive[c].any()]
    total = pixels.student.sum() * 0
    if len(valid) <= 1:
        return total
    for i in range(len(valid)):
        queue, chosen = ordered(bank, valid[i]), drawn(sets.anchor[i], draws.anchors[i])
        if chosen and len(queue):
            negatives = queue[(draws.negatives[valid[i]] * len(queue)).long()]
            total = total + info_nce(student[chosen], teacher[sets.positive[i]].mean(0), negatives, 0.5)
    return total / len(valid)


@pytest.mark.parametrize("labels", [None, (0, 1, 3), (0, 2, 4), (1, 4), (2, 3), (3,)])
def test_the_whole_loss_is_that_of_the_releases_loop(labels):
    one, two = scene(labels=labels, seed=2), scene(labels=labels, seed=2)
    own = _own(one, right=True)  # with the defective one, class 0 is always present
    torch.manual_seed(1)
    draws = Draws(torch.rand(C, 6), torch.rand(C, 8), torch.rand(C, 6, 5))
    bank = MemoryBank([10] * C, D)
    found = upstream.candidates(one, own, RULE, draws)
    found, positive = upstream.mispaired(found, upstream.positives(found))
    loss = contrastive(one, found, positive, bank, draws, 0.5, World())
    expected = _slow_loss(two, _slow_sets(two, own, RULE), draws, bank)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(one.student.grad, two.student.grad, rtol=1e-4, atol=1e-7)
    assert (loss > 0) == (labels in (None, (0, 1, 3), (0, 2, 4), (1, 4)))


# ---- reliable pixels --------------------------------------------------------------------------------------------


def _surest(values: Tensor, known: Tensor, share: Tensor, world: World) -> Tensor:
    thresholds = masked_quantile(values, known, torch.stack([1 - share, share]), world)
    return split(values, known, thresholds).surest


@pytest.mark.parametrize("ranks", [1, 2])
def test_surest_are_the_share_alpha_of_the_smallest_entropies(ranks):
    torch.manual_seed(0)
    values, known = torch.rand(2, 10, 10), torch.rand(2, 10, 10) > 0.3
    share = torch.tensor(0.2)
    found = torch.cat(
        on_ranks(ranks, lambda w: _surest(values.chunk(ranks)[w.rank], known.chunk(ranks)[w.rank], share, w))
    )
    limit = values[known].double().quantile(share.double())
    assert torch.equal(found, known & (values.double() <= limit + 1e-7))
    assert not _surest(values, torch.zeros_like(known), share, World()).any()


def test_at_the_end_of_the_schedule_one_pixel_is_surest():
    values = torch.tensor([0.5, 0.1, 0.3])
    assert _surest(values, values > 0, torch.tensor(0.0), World()).tolist() == [False, True, False]
