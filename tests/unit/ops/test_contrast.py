"""Candidates and loss against the equations, written out pixel by pixel and with autograd."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.bank import MemoryBank
from pipeline.ops.contrast import (
    Candidates,
    Draws,
    Pixels,
    Positives,
    Rule,
    averaged,
    candidates,
    contrastive_loss,
    kth_largest,
    negative_mask,
    positives,
)
from pipeline.ops.selection import Members
from pipeline.ops.world import World
from tests.unit.ops.banks import ordered
from tests.unit.ops.scenes import C, D, H, W, binary, drawn, flat, info_nce, places, scene
from tests.unit.ops.worlds import on_ranks

RULES = [Rule(0.3, *ranks) for ranks in [(1, 2), (2, 4), (3, 20), (1, 5), (4, 5)]]


class _Sets(NamedTuple):
    anchor: Tensor
    positive: Tensor
    negative: Tensor


def _slow_sets(pixels: Pixels, rule: Rule) -> _Sets:
    """Paper eq. 5, 6 and 9-12, one pixel and class at a time: bool [C,n] each."""
    classes = pixels.logits.shape[1]
    found = _Sets(*(torch.zeros(classes, pixels.label.numel(), dtype=torch.bool) for _ in range(3)))
    for n, (b, y, x) in enumerate(places(pixels.label)):
        p, label = pixels.logits[b, :, y, x].double().softmax(0), int(pixels.label[b, y, x])
        for c in range(classes):
            rank = int((p > p[c]).sum())
            of_class = label == c and bool(pixels.reliable[b, y, x])
            found.positive[c, n] = of_class
            found.anchor[c, n] = of_class and bool(p[c] > rule.delta_p)
            if b < pixels.labeled:
                found.negative[c, n] = label not in (255, c) and rank < rule.r_l
            else:
                found.negative[c, n] = bool(pixels.unreliable[b, y, x]) and rule.r_l <= rank < rule.r_h
    return found


def _draws(classes: int = C, anchors: int = 6, keys: int = 8, groups: int | None = None) -> Draws:
    return Draws(torch.rand(classes, anchors), torch.rand(classes, keys), torch.rand(classes, groups or anchors, 5))


# ---- who is what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("labels", [None, (0, 1, 3), (2,)])
def test_candidates_are_those_of_the_equations(rule, labels):
    pixels = scene(labels=labels)
    sets, draws = _slow_sets(pixels, rule), _draws()
    found = candidates(pixels, rule, draws)
    teacher = flat(pixels.teacher).double()
    assert torch.equal(found.anchor_count, sets.anchor.sum(1))
    assert torch.equal(found.positive_count, sets.positive.sum(1))
    assert torch.equal(found.negative_count, sets.negative.sum(1))
    keys, valid = Members(sets.negative).stratified(draws.keys)
    assert torch.equal(found.keys_valid, valid)
    assert ((found.anchors >= 0) & (found.anchors < 3 * H * W)).all()
    for c in range(C):
        assert torch.equal(found.keys[c][valid[c]], keys[c][valid[c]])
        torch.testing.assert_close(
            found.positive_sum[c].double(), teacher[sets.positive[c]].sum(0), rtol=1e-5, atol=1e-5
        )
        if sets.anchor[c].any():
            assert found.anchors[c].tolist() == drawn(sets.anchor[c], draws.anchors[c])
    assert sets.anchor.any()
    assert sets.negative.any()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_negative_mask_is_that_of_the_equations(rule):
    pixels = scene(seed=1)
    found = negative_mask(pixels, rule)
    assert found.dtype == torch.uint8
    assert torch.equal(found.bool(), _slow_sets(pixels, rule).negative)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_labels_may_have_any_type(dtype):
    pixels, rule, draws = scene(), RULES[1], _draws()
    other = candidates(pixels._replace(label=pixels.label.to(dtype)), rule, draws)
    for one, two in zip(candidates(pixels, rule, draws), other, strict=True):
        assert torch.equal(one, two)


def test_teacher_maps_may_be_half_precision_and_in_channels_last_layout():
    pixels, rule, draws = scene(), RULES[1], _draws()
    low = pixels._replace(logits=pixels.logits.bfloat16(), teacher=pixels.teacher.bfloat16())
    high = pixels._replace(logits=low.logits.float(), teacher=low.teacher.float())
    low = low._replace(teacher=low.teacher.to(memory_format=torch.channels_last))
    for one, two in zip(candidates(low, rule, draws), candidates(high, rule, draws), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=5e-2)
    assert candidates(low, rule, draws).positive_sum.dtype == torch.float32


@pytest.mark.parametrize("labeled", [0, 1, 3])
def test_how_many_images_are_labeled(labeled):
    pixels = scene()._replace(labeled=labeled)
    assert torch.equal(negative_mask(pixels, RULES[1]).bool(), _slow_sets(pixels, RULES[1]).negative)


def test_no_labeled_pixel_is_negative_and_anchor_of_one_class():
    pixels, rule = scene(), Rule(0.0, 2, 5)
    negative = negative_mask(pixels, rule).view(C, 3, H, W)[:, 0].bool()
    own = pixels.label[0] == torch.arange(C).view(-1, 1, 1)
    assert not (negative & own).any()
    assert negative.any()


def test_ignored_pixels_are_in_no_set():
    """Even if the caller calls them reliable."""
    pixels, draws = scene(), _draws(anchors=200, keys=200)
    ignored = (pixels.label == 255).flatten()
    reliable = pixels.reliable | (pixels.label == 255)
    found = candidates(pixels._replace(reliable=reliable), RULES[2], draws)
    assert torch.equal(found.positive_count, candidates(pixels, RULES[2], draws).positive_count)
    assert not ignored[found.keys[found.keys_valid]].any()
    assert not ignored[found.anchors[found.anchor_count > 0]].any()


def test_a_pixel_without_a_probability_is_no_anchor():
    pixels = scene(labels=(1,))
    found = candidates(pixels._replace(logits=torch.full((3, C, H, W), torch.nan)), RULES[1], _draws())
    assert not found.anchor_count.any()


@pytest.mark.parametrize("classes", [*range(1, 22), 60, 150])
def test_kth_largest_is_that_of_a_sort(classes):
    """Both ways of finding it: up to 21 classes and at the ends of many, by insertion; else by `topk`."""
    torch.manual_seed(classes)
    ranks = range(1, classes + 1) if classes < 60 else (1, 3, 4, 8, 9, classes // 2, classes - 20, classes - 3, classes)
    for values in (torch.randn(2, classes, 3, 4), torch.randint(0, 4, (2, classes, 3, 4)).float()):
        ordered_values = values.sort(1, descending=True).values
        for k in ranks:
            assert torch.equal(kth_largest(values, k), ordered_values[:, k - 1])


def test_classes_of_equal_scores_have_equal_ranks():
    """Three classes lead together: none is outranked by another, so all of them are likely for r_l = 1."""
    pixels = scene()
    logits = torch.tensor([2.0, 2.0, 2.0, 1.0, 0.0]).view(1, C, 1, 1).expand(3, -1, H, W)
    for rule in RULES:
        tied = pixels._replace(logits=logits)
        assert torch.equal(negative_mask(tied, rule).bool(), _slow_sets(tied, rule).negative)


# ---- prototypes over ranks --------------------------------------------------------------------------------------


def _found(counts: list[int], anchors: list[int], sums: Tensor) -> Candidates:
    """What a rank found, as far as prototypes and weights go."""
    nothing = torch.zeros(len(counts), 0, dtype=torch.long)
    count, anchor = torch.tensor(counts), torch.tensor(anchors)
    return Candidates(nothing, anchor, sums, count, nothing, nothing.bool(), anchor)


def test_prototypes_are_the_means_over_all_ranks():
    rule, draws = RULES[1], _draws()
    scenes = [scene(seed=0, labels=(0, 1, 3)), scene(seed=1, labels=(1, 2))]
    results = on_ranks(2, lambda w: positives(candidates(scenes[w.rank], rule, draws), w))
    sets = [_slow_sets(pixels, rule).positive for pixels in scenes]
    features = [flat(pixels.teacher) for pixels in scenes]
    for found in results:
        for c in range(C):
            members = torch.cat([f[s[c]] for f, s in zip(features, sets, strict=True)])
            assert found.pixels[c] == len(members)
            expected = members.mean(0) if len(members) else torch.zeros(D)
            torch.testing.assert_close(found.mean[c], expected, rtol=1e-5, atol=1e-6)
    assert results[0].pixels[4] == 0
    assert not results[0].mean[4].any()


def test_alone_a_class_with_anchors_weighs_1():
    found = positives(_found([5, 5, 0, 3], [2, 0, 0, 3], torch.zeros(4, D)), World())
    assert found.weight.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_mean_over_ranks_expects_what_one_draw_from_all_does(ranks):
    """Each rank's mean over its own candidates, times its weight."""
    torch.manual_seed(0)
    counts = torch.tensor([[4, 0, 1, 0], [1, 3, 0, 0], [7, 5, 0, 0]])[:ranks]
    values = [[torch.rand(int(n)) for n in own] for own in counts]
    weights = [
        p.weight
        for p in on_ranks(ranks, lambda w: positives(_found([9] * 4, counts[w.rank].tolist(), torch.zeros(4, D)), w))
    ]
    for c in range(4):
        everything = torch.cat([own[c] for own in values])
        mean = sum(weights[r][c] * own[c].mean() for r, own in enumerate(values) if len(own[c])) / ranks
        torch.testing.assert_close(
            torch.as_tensor(mean, dtype=torch.float32), everything.mean() if len(everything) else torch.tensor(0.0)
        )
        assert all(weights[r][c] == 0 for r in range(ranks) if counts[r, c] == 0)


def test_averaged_moves_only_the_classes_that_are_present():
    previous, mean = torch.randn(3, D), torch.randn(3, D)
    current = Positives(mean, torch.tensor([4.0, 0.0, 1.0]), torch.zeros(3))
    found = averaged(previous, current, torch.tensor(0.75))
    torch.testing.assert_close(found[[0, 2]], 0.75 * previous[[0, 2]] + 0.25 * mean[[0, 2]])
    assert torch.equal(found[1], previous[1])
    assert torch.equal(averaged(previous, current, torch.tensor(0.0))[[0, 2]], mean[[0, 2]])


# ---- the loss ---------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    loss: Tensor
    found: Candidates
    draws: Draws


RULE = Rule(0.3, 2, 4)


def _run(pixels: Pixels, bank: MemoryBank, *, rule: Rule = RULE, draws: Draws | None = None, l_b: bool = False) -> _Run:
    torch.manual_seed(0)
    draws = draws or _draws(pixels.logits.shape[1])
    found = candidates(pixels, rule, draws)
    loss = contrastive_loss(pixels, found, positives(found, World()), bank, draws, 0.5, World(), binary=l_b)
    return _Run(loss, found, draws)


def _expected(pixels: Pixels, draws: Draws, bank: MemoryBank, l_b: bool = False) -> Tensor:
    """The loss from the classes that have everything; `bank` is that after the push."""
    sets = _slow_sets(pixels, RULE)
    student, teacher = flat(pixels.student), flat(pixels.teacher)
    present = [c for c in range(C) if sets.positive[c].any()]
    total, sharing = pixels.student.sum() * 0, draws.anchors.shape[1] // draws.negatives.shape[1]
    for c in present if len(present) > 1 else ():
        chosen, queue = drawn(sets.anchor[c], draws.anchors[c]), ordered(bank, c)
        if chosen and len(queue):
            ranks = (draws.negatives[c] * len(queue)).long()
            negatives = torch.stack([queue[ranks[m // sharing]] for m in range(len(chosen))])
            one = (binary if l_b else info_nce)(student[chosen], teacher[sets.positive[c]].mean(0), negatives, 0.5)
            total = total + one / len(present)
    return total


@pytest.mark.parametrize("l_b", [False, True])
@pytest.mark.parametrize("groups", [6, 3, 1])
@pytest.mark.parametrize("labels", [None, (0, 1, 3), (2, 4)])
def test_contrastive_loss_with_absent_classes(labels, groups, l_b):
    one, two = scene(labels=labels), scene(labels=labels)
    bank = MemoryBank([10] * C, D)
    for _ in range(2):  # the second time, the bank is full of both scenes
        one.student.grad = two.student.grad = None
        torch.manual_seed(3)
        run = _run(one, bank, draws=_draws(groups=groups), l_b=l_b)
        expected = _expected(two, run.draws, bank, l_b)
        run.loss.backward()
        expected.backward()
        assert run.loss > 0
        torch.testing.assert_close(run.loss, expected)
        torch.testing.assert_close(one.student.grad, two.student.grad, rtol=1e-4, atol=1e-7)


def test_a_class_without_anchors_adds_nothing_but_counts():
    """The teacher doubts all pixels of class 3, so it is present (a prototype) and has no anchor."""
    pixels, bank = scene(), MemoryBank([10] * C, D)
    pixels.logits[:, 3] = -9.0
    run = _run(pixels, bank)
    assert (run.found.anchor_count == 0).tolist() == [False, False, False, True, False]
    assert run.found.positive_count[3] > 0
    torch.testing.assert_close(run.loss, _expected(pixels, run.draws, bank))


def test_a_class_without_keys_adds_nothing_but_counts():
    """Class 3 leads everywhere it is not the truth, and never in an unlabeled image: no negatives of it."""
    pixels, bank = scene(), MemoryBank([10] * C, D)
    pixels.logits[0, 3] = torch.where(pixels.label[0] == 3, 9.0, -9.0)
    pixels.logits[1:, 3] = 9.0
    run = _run(pixels, bank)
    assert (bank.count == 0).tolist() == [False, False, False, True, False]
    assert run.found.anchor_count[3] > 0
    torch.testing.assert_close(run.loss, _expected(pixels, run.draws, bank))


def test_new_keys_are_pushed_before_the_draw_and_are_the_teachers():
    pixels, bank = scene(), MemoryBank([300] * C, D)
    _run(pixels, bank)
    negative = _slow_sets(pixels, RULE).negative
    assert torch.equal(bank.count, negative.sum(1).clamp_max(8))
    unit = F.normalize(flat(pixels.teacher), dim=-1)
    for c in range(C):
        distance = torch.cdist(ordered(bank, c), unit[negative[c]])
        assert (distance.min(1).values < 1e-3).all()


def test_a_bfloat16_bank_gives_nearly_the_same():
    one, two = scene(), scene()
    exact, low = _run(one, MemoryBank([10] * C, D)), _run(two, MemoryBank([10] * C, D, torch.bfloat16))
    exact.loss.backward()
    low.loss.backward()
    torch.testing.assert_close(low.loss, exact.loss, rtol=5e-3, atol=0)
    assert one.student.grad is not None
    torch.testing.assert_close(
        two.student.grad, one.student.grad, rtol=0, atol=0.02 * float(one.student.grad.abs().max())
    )


def test_damaged_teacher_pixels_do_not_spoil_the_bank():
    pixels, bank = scene(), MemoryBank([300] * C, D)
    pixels.teacher[1, :, 2] = torch.nan
    _run(pixels, bank)
    assert bank.keys.isfinite().all()
    _run(scene(seed=5), bank).loss.backward()


def _zero_with_graph(pixels: Pixels) -> None:
    loss = _run(pixels, MemoryBank([10] * C, D)).loss
    assert loss == 0
    loss.backward()
    assert pixels.student.grad is not None
    assert not pixels.student.grad.any()


def test_one_class_present_is_loss_0():
    _zero_with_graph(scene(labels=(2,)))


def test_no_known_pixel_is_loss_0():
    pixels = scene()
    nothing = torch.zeros(3, H, W, dtype=torch.bool)
    _zero_with_graph(pixels._replace(label=torch.full((3, H, W), 255), reliable=nothing, unreliable=nothing))


def test_no_anchors_is_loss_0():
    """The teacher is sure of nothing: no p_c > delta_p."""
    _zero_with_graph(scene()._replace(logits=torch.zeros(3, C, H, W)))


def test_zero_features_stay_finite():
    pixels = scene()._replace(student=torch.zeros(3, D, H, W, requires_grad=True), teacher=torch.zeros(3, D, H, W))
    loss = _run(pixels, MemoryBank([10] * C, D)).loss
    loss.backward()
    assert loss.isfinite()
    assert pixels.student.grad is not None
    assert pixels.student.grad.isfinite().all()


# ---- one rank or two --------------------------------------------------------------------------------------------


def _four_images(classes: int, seed: int) -> Pixels:
    """Two labeled and two unlabeled images of 3 x 4 pixels."""
    torch.manual_seed(seed)
    label = torch.randint(0, classes, (4, 3, 4))
    label[torch.rand(label.shape) < 0.2] = 255
    known, side = label != 255, torch.rand(label.shape)
    side[:2] = 0
    features = torch.randn(4, D, 3, 4), torch.randn(4, D, 3, 4)
    return Pixels(*features, torch.randn(4, classes, 3, 4) * 2, label, known & (side < 0.6), known & (side >= 0.6), 2)


def _share(pixels: Pixels, rank: int) -> Pixels:
    """One labeled and one unlabeled image."""
    images = [rank, rank + 2]
    tensors = {name: getattr(pixels, name)[images] for name in pixels._fields if name != "labeled"}
    return pixels._replace(**tensors, labeled=1)


def _exhaustive(count: int, classes: int) -> Tensor:
    """Numbers that draw each member of a set equally often, if its size divides `count`: [C,count]."""
    return ((torch.arange(count) + 0.5) / count).expand(classes, -1)


@pytest.mark.parametrize("l_b", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_two_ranks_have_the_keys_and_the_gradient_of_one(seed, l_b):
    """If every candidate enters the bank and anchors and negatives are drawn exhaustively, no chance is left."""
    classes, rule = 3, Rule(0.3, 1, 2)
    whole = _four_images(classes, seed)
    parts = [_share(whole, rank) for rank in range(2)]
    everything = [_slow_sets(pixels, rule) for pixels in (whole, *parts)]
    anchors = math.lcm(*(max(1, int(n)) for sets in everything for n in sets.anchor.sum(1)))
    negatives = math.lcm(*(max(1, int(n)) for n in everything[0].negative.sum(1)))
    assert anchors * negatives < 3e6
    assert (everything[1].anchor.sum(1) != everything[2].anchor.sum(1)).any()
    draws = Draws(
        _exhaustive(anchors, classes),
        torch.rand(classes, int(everything[0].negative.sum(1).max())),
        _exhaustive(negatives, classes)[:, None],
    )
    banks = [MemoryBank([60] * classes, D) for _ in range(2)]

    def run(pixels: Pixels, bank: MemoryBank, world: World) -> tuple[Tensor, Tensor, MemoryBank]:
        bank, leaf = copy.deepcopy(bank), pixels.student.clone().requires_grad_()
        pixels = pixels._replace(student=leaf)
        found = candidates(pixels, rule, draws)
        loss = contrastive_loss(pixels, found, positives(found, world), bank, draws, 0.5, world, binary=l_b)
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad, bank

    loss, gradient, bank = run(whole, banks[0], World())
    ranks = on_ranks(2, lambda w: run(parts[w.rank], banks[w.rank], w))
    for c in range(classes):
        for _, _, other in ranks:
            assert sorted(ordered(other, c).tolist()) == sorted(ordered(bank, c).tolist())
    assert torch.equal(ranks[0][2].keys, ranks[1][2].keys)
    assert loss > 0
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss, rtol=1e-5, atol=1e-6)
    for rank, (_, share, _) in enumerate(ranks):
        torch.testing.assert_close(share / 2, gradient[[rank, rank + 2]], rtol=1e-4, atol=1e-6)
