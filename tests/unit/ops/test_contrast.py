"""Candidate sets and loss against the equations, written out pixel by pixel and with autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.bank import MemoryBank
from pipeline.ops.contrast import Draws, Pixels, Sets, candidate_sets, contrastive_loss, info_nce, prototypes
from pipeline.ops.selection import Members, rows
from pipeline.ops.world import World

C, D, H, W = 5, 4, 6, 7


def _pixels(classes: int = C, seed: int = 0, labels: tuple[int, ...] | None = None) -> Pixels:
    """Three images, the first one labeled; labels hold 255, reliable and unreliable overlap with nothing."""
    torch.manual_seed(seed)
    choice = torch.tensor([*(labels or range(classes)), 255])
    label = choice[torch.randint(0, len(choice), (3, H, W))]
    known, side = label != 255, torch.rand(3, H, W)
    reliable = known & (side < 0.7)
    reliable[0] = known[0]
    return Pixels(
        student=torch.randn(3, D, H, W, requires_grad=True),
        teacher=torch.randn(3, D, H, W),
        probability=(torch.randn(3, classes, H, W) * 2).softmax(1),
        label=label,
        reliable=reliable,
        unreliable=known & (side >= 0.6),
        labeled=torch.tensor([True, False, False]),
    )


def _slow_sets(pixels: Pixels, delta_p: float, r_l: int, r_h: int) -> Sets:
    """Paper eq. 5, 6 and 9-12, one pixel and class at a time."""
    classes = pixels.probability.shape[1]
    found = Sets(*(torch.zeros(classes, 3 * H * W, dtype=torch.bool) for _ in range(3)))
    for n, (b, y, x) in enumerate(torch.cartesian_prod(*map(torch.arange, (3, H, W))).tolist()):
        p, label = pixels.probability[b, :, y, x], int(pixels.label[b, y, x])
        for c in range(classes):
            rank = int((p > p[c]).sum())
            of_class = label == c and bool(pixels.reliable[b, y, x])
            found.positive[c, n] = of_class
            found.anchor[c, n] = of_class and bool(p[c] > delta_p)
            if pixels.labeled[b]:
                found.negative[c, n] = label not in (255, c) and rank < r_l
            else:
                found.negative[c, n] = bool(pixels.unreliable[b, y, x]) and r_l <= rank < r_h
    return found


@pytest.mark.parametrize(("r_l", "r_h"), [(1, 2), (2, 4), (3, 20), (1, 5), (4, 5)])
def test_candidate_sets(r_l, r_h):
    pixels = _pixels()
    for found, expected in zip(candidate_sets(pixels, 0.3, r_l, r_h), _slow_sets(pixels, 0.3, r_l, r_h), strict=True):
        assert torch.equal(found, expected)
        assert expected.any()


def test_no_pixel_is_negative_and_anchor_of_one_class():
    sets = candidate_sets(_pixels(), 0.3, 2, 5)
    labeled = torch.zeros(3 * H * W, dtype=torch.bool)
    labeled[: H * W] = True
    assert not (sets.anchor & sets.negative & labeled).any()


def test_ignored_pixels_are_in_no_set():
    pixels = _pixels()
    ignored = (pixels.label == 255).flatten()
    for members in candidate_sets(pixels, 0.3, 3, 20):
        assert not members[:, ignored].any()


def test_prototypes_are_class_means():
    pixels = _pixels(labels=(0, 1, 3))
    positive = candidate_sets(pixels, 0.3, 3, 20).positive
    flat = pixels.teacher.permute(0, 2, 3, 1).reshape(-1, D)
    found = prototypes(pixels.teacher, positive)
    for c in range(C):
        expected = flat[positive[c]].mean(0) if positive[c].any() else torch.zeros(D)
        torch.testing.assert_close(found[c], expected)
    assert not found[[2, 4]].any()


def _plain_info_nce(anchors: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Eq. 3 by autograd: cosines, cross entropy with the positive as target."""
    losses = []
    for a, z, others in zip(anchors, positives, negatives, strict=True):
        candidates = torch.cat([z.expand(len(a), 1, -1), others], 1)
        logits = F.cosine_similarity(a[:, None], candidates, dim=-1) / temperature
        losses.append(F.cross_entropy(logits, torch.zeros(len(a), dtype=torch.long)))
    return torch.stack(losses)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_info_nce_and_its_gradient(temperature):
    torch.manual_seed(0)
    anchors, weights = torch.randn(3, 6, D), torch.tensor([1.0, -2.0, 0.5])
    positives, keys = torch.randn(3, D), F.normalize(torch.randn(20, D), dim=-1)
    index = torch.randint(0, 20, (3, 6, 8))
    one, two = anchors.clone().requires_grad_(), anchors.clone().requires_grad_()
    found = info_nce(one, positives, keys, index, temperature)
    expected = _plain_info_nce(two, positives, keys[index], temperature)
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def _whole(pixels: Pixels, bank: MemoryBank, seed: int = 0) -> tuple[Tensor, Tensor, Sets, Draws]:
    classes = pixels.probability.shape[1]
    torch.manual_seed(seed)
    draws = Draws(torch.rand(classes, 6), torch.rand(classes, 8), torch.rand(classes, 6, 5))
    sets = candidate_sets(pixels, 0.3, 2, 4)
    loss, count = contrastive_loss(pixels, sets, bank, draws, 0.5, World())
    return loss, count, sets, draws


def _expected(pixels: Pixels, sets: Sets, draws: Draws, bank: MemoryBank) -> Tensor:
    """The loss from the classes that have everything; `bank` is that after the push."""
    present = [c for c in range(len(sets.positive)) if sets.positive[c].any()]
    total = pixels.student.sum() * 0
    anchors, chosen = Members(sets.anchor).draw(draws.anchors), bank.draw(draws.negatives)
    for c in present:
        if sets.anchor[c].any() and bank.count[c] > 0:
            total = (
                total
                + _plain_info_nce(
                    rows(pixels.student, anchors[c : c + 1]),
                    prototypes(pixels.teacher, sets.positive)[c : c + 1],
                    bank.keys[chosen[c : c + 1]],
                    0.5,
                ).sum()
            )
    return total / max(len(present), 1) if len(present) > 1 else total * 0


@pytest.mark.parametrize("labels", [None, (0, 1, 3), (2, 4)])
def test_contrastive_loss_with_absent_classes(labels):
    one, two = _pixels(labels=labels), _pixels(labels=labels)
    bank = MemoryBank([10] * C, D)
    loss, count, sets, draws = _whole(one, bank)
    expected = _expected(two, sets, draws, bank)
    loss.backward()
    expected.backward()
    assert loss > 0
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(one.student.grad, two.student.grad, rtol=1e-4, atol=1e-7)
    assert torch.equal(count, sets.anchor.sum(1))


def test_a_class_without_anchors_adds_nothing_but_counts():
    """The teacher doubts all pixels of class 3, so it is present (a prototype) and has no anchor."""
    pixels, bank = _pixels(), MemoryBank([10] * C, D)
    pixels.probability[:, 3] = 0.01
    loss, count, sets, draws = _whole(pixels, bank)
    assert (count == 0).tolist() == [False, False, False, True, False]
    assert sets.positive[3].any()
    torch.testing.assert_close(loss, _expected(pixels, sets, draws, bank))


def test_new_keys_are_pushed_before_the_draw_and_are_the_teachers():
    pixels, bank = _pixels(), MemoryBank([300] * C, D)
    _, _, sets, _ = _whole(pixels, bank)
    assert torch.equal(bank.count, sets.negative.sum(1).clamp_max(8))
    unit = F.normalize(pixels.teacher.permute(0, 2, 3, 1).reshape(-1, D), dim=-1)
    for c in range(C):
        distance = torch.cdist(bank.ordered(c), unit[sets.negative[c]])
        assert (distance.min(1).values < 1e-3).all()


def _zero_with_graph(pixels: Pixels, bank: MemoryBank) -> None:
    loss, *_ = _whole(pixels, bank)
    assert loss == 0
    loss.backward()
    assert pixels.student.grad is not None
    assert not pixels.student.grad.any()


def test_one_class_present_is_loss_0():
    _zero_with_graph(_pixels(labels=(2,)), MemoryBank([10] * C, D))


def test_no_known_pixel_is_loss_0():
    pixels = _pixels()
    nothing = torch.zeros(3, H, W, dtype=torch.bool)
    blank = pixels._replace(label=torch.full((3, H, W), 255), reliable=nothing, unreliable=nothing)
    _zero_with_graph(blank, MemoryBank([10] * C, D))


def test_no_anchors_is_loss_0():
    """The teacher is sure of nothing: no p_c > delta_p."""
    pixels = _pixels()
    _zero_with_graph(pixels._replace(probability=torch.full((3, C, H, W), 1 / C)), MemoryBank([10] * C, D))


def test_zero_features_stay_finite():
    pixels = _pixels()._replace(student=torch.zeros(3, D, H, W, requires_grad=True), teacher=torch.zeros(3, D, H, W))
    loss, *_ = _whole(pixels, MemoryBank([10] * C, D))
    loss.backward()
    assert loss.isfinite()
    assert pixels.student.grad is not None
    assert pixels.student.grad.isfinite().all()
