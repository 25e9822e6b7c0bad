from dataclasses import replace
from typing import cast

import pytest
import torch

from pipeline.methods.self_training import SelfTraining
from pipeline.ops.mixing import small_box_masks
from tests.unit.methods.conftest import CPU, SIZE, batch, full, step


def _method(build, **options) -> SelfTraining:
    return cast("SelfTraining", build("self_training", **options))


def test_plain_every_labeled_pixel_of_either_side_weighs_the_same(build):
    """L = sum of the cross entropies of all labeled pixels / their number, pixel by pixel."""
    on = batch(2)
    assert on.unlabeled is not None
    assert on.unlabeled.pseudo is not None
    on.unlabeled.pseudo[0, :, 5:9] = 255
    method = _method(build, strong=False)
    found = method(on, step(3))
    with torch.no_grad():
        logits = full(method.student(torch.cat([on.labeled.image, on.unlabeled.image])).logits).log_softmax(1)
    label = torch.cat([on.labeled.truth, on.unlabeled.pseudo])
    known = [(b, y, x) for b, y, x in torch.ones_like(label).nonzero().tolist() if label[b, y, x] != 255]
    total = -sum(float(logits[b, label[b, y, x], y, x]) for b, y, x in known)
    assert float(found.terms["supervised"].detach()) == pytest.approx(total / len(known), rel=1e-4)
    expected = (on.unlabeled.pseudo != 255).sum() / on.unlabeled.valid.sum()
    assert float(found.logs["kept"]) == pytest.approx(float(expected))


@pytest.mark.parametrize("cutout", [0.0, 0.5, 1.0])
def test_holes_hold_noise_and_carry_no_label(build, cutout):
    unlabeled = batch(4).unlabeled
    assert unlabeled is not None
    assert unlabeled.pseudo is not None
    method = _method(build, cutout=cutout)
    image, label = method.seen(unlabeled, unlabeled.pseudo, step(3))
    draws = step(3).uniform_per_image("cutout", (4, 5), CPU)
    used = draws[:, 4] < cutout
    hole = small_box_masks(draws[:, :4], (SIZE, SIZE)) & used.view(-1, 1, 1)
    assert used.any() == hole.any() == (cutout > 0)
    assert (label[hole] == 255).all()
    assert torch.equal(label[~hole], unlabeled.pseudo[~hole])
    moved = image.permute(0, 2, 3, 1), unlabeled.strong[0].permute(0, 2, 3, 1)
    assert torch.equal(moved[0][~hole], moved[1][~hole])
    if cutout:
        assert moved[0][hole].float().std() > 60  # uniform bytes: 74


def test_the_strong_view_is_what_is_learned_from(build):
    on = batch(2)
    assert on.unlabeled is not None
    other = replace(on, unlabeled=replace(on.unlabeled, strong=tuple(255 - view for view in on.unlabeled.strong)))
    for strong in (True, False):
        method = _method(build, strong=strong)
        losses = [float(method(each, step(3)).terms["supervised"].detach()) for each in (on, other)]
        assert (losses[0] != losses[1]) == strong
