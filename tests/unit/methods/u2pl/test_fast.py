"""The loss against the equations and autograd, alone and on two ranks."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.methods.u2pl import reference
from pipeline.methods.u2pl.bank import MemoryBank
from pipeline.methods.u2pl.fast import candidates, contrastive, positives
from pipeline.methods.u2pl.reference import Candidates, Draws, Pixels, Rule
from pipeline.ops.selection import rows
from pipeline.ops.world import World
from tests.unit.methods.u2pl.banks import ordered
from tests.unit.methods.u2pl.scenes import C, D, H, W, binary, drawn, draws_of, info_nce, scene
from tests.unit.ops.worlds import on_ranks

# ---- the loss ---------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    loss: Tensor
    found: Candidates
    draws: Draws


RULE = Rule(0.3, 2, 4)


def _run(pixels: Pixels, bank: MemoryBank, *, rule: Rule = RULE, draws: Draws | None = None, l_b: bool = False) -> _Run:
    torch.manual_seed(0)
    draws = draws or draws_of(pixels.logits.shape[1])
    found = candidates(pixels, rule, draws)
    loss = contrastive(pixels, found, positives(found, World()), bank, draws, 0.5, World(), binary=l_b)
    return _Run(loss, found, draws)


def _expected(pixels: Pixels, draws: Draws, bank: MemoryBank, l_b: bool = False) -> Tensor:
    """The loss from the classes that have everything; `bank` is that after the push."""
    sets = reference.sets(pixels, RULE)
    student, teacher = rows(pixels.student), rows(pixels.teacher)
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
        run = _run(one, bank, draws=draws_of(groups=groups), l_b=l_b)
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
    negative = reference.sets(pixels, RULE).negative
    assert torch.equal(bank.count, negative.sum(1).clamp_max(8))
    unit = F.normalize(rows(pixels.teacher), dim=-1)
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
    _zero_with_graph(pixels._replace(label=torch.full((3, H, W), 255), may_be_anchor=nothing, may_be_negative=nothing))


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
    everything = [reference.sets(pixels, rule) for pixels in (whole, *parts)]
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
        loss = contrastive(pixels, found, positives(found, world), bank, draws, 0.5, world, binary=l_b)
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
