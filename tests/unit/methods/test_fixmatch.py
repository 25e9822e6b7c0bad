from typing import cast

import pytest
import torch
from torch import Tensor

from pipeline.methods.fixmatch import FixMatch, Pseudo, cutmixed
from pipeline.ops.mixing import small_box_masks
from tests.unit.methods.conftest import CPU, SIZE, batch, full, pseudo_loss, step, train_step


def _trained(build, **options) -> FixMatch:
    method = cast("FixMatch", build("fixmatch", **options))
    for index in range(3):
        train_step(method, index)
    return method


def test_cutmix_moves_image_label_and_validity_together():
    unlabeled = batch(4).unlabeled
    assert unlabeled is not None
    label = torch.randint(0, 5, (4, SIZE, SIZE))
    for probability, expected_used in ((0.0, [False] * 4), (1.0, [True] * 4), (0.5, None)):
        own = Pseudo(unlabeled.image, label, unlabeled.valid)
        mixed = cutmixed(own, step(3), "name", probability)
        draws = step(3).uniform_per_image("name", (4, 5), CPU)
        used = (draws[:, 4] < probability).tolist()
        assert expected_used is None or used == expected_used
        box = small_box_masks(draws[:, :4], (SIZE, SIZE))
        for b, y, x in torch.ones_like(label).nonzero().tolist():
            source = (1, 0, 3, 2)[b] if used[b] and box[b, y, x] else b
            assert torch.equal(mixed.image[b, :, y, x], unlabeled.image[source, :, y, x])
            assert mixed.label[b, y, x] == label[source, y, x]
            assert mixed.valid[b, y, x] == unlabeled.valid[source, y, x]


@pytest.mark.parametrize("threshold", [0.0, 0.45])
def test_the_loss_pixel_by_pixel(build, threshold):
    method, on = _trained(build, threshold=threshold, cutmix=1.0), batch(4, seed=3)
    unlabeled = method.sides(on)[1]
    unlabeled.valid[1, :, 3:9] = False
    found = method(on, step(3))
    with torch.no_grad():
        weak = full(method.student(torch.cat([on.labeled.image, unlabeled.image])).logits[4:]).softmax(1)
        mixed = cutmixed(Pseudo(unlabeled.strong[0], _indices(weak), unlabeled.valid), step(3), "cutmix", 1.0)
        strong = full(method.student(mixed.image).logits)
    loss, kept = pseudo_loss(strong, weak, mixed.label, unlabeled.valid, threshold)
    assert float(found.terms["strong"].detach()) == pytest.approx(loss / 2, rel=1e-4)
    assert float(found.logs["kept"]) == pytest.approx(kept)
    assert 0 < kept <= 1
    assert (kept == 1) == (threshold == 0)


def _indices(weak: Tensor) -> Tensor:
    """Number of each pixel of the batch, to see where mixing takes it from."""
    return torch.arange(weak[:, 0].numel()).view(weak[:, 0].shape)


def test_the_supervised_loss_has_half_its_weight(build):
    method, on = _trained(build), batch(4, seed=3)
    found = method(on, step(3)).terms["supervised"]
    with torch.no_grad():
        prediction = method.student(torch.cat([on.labeled.image, method.sides(on)[1].image]))
        expected = method.supervised(prediction.of(slice(4)), on.labeled, step(3).world)
    torch.testing.assert_close(found.detach(), expected / 2)


def test_the_weak_view_gets_no_gradient_from_its_labels(build):
    """The strong loss reaches the weights through the strong view alone."""
    method, on = _trained(build, threshold=0.0), batch(4, seed=3)
    outputs: list[Tensor] = []
    method.student.register_forward_hook(lambda _, __, out: outputs.append(out.logits))
    strong = method(on, step(3)).terms["strong"]
    weak, seen = torch.autograd.grad(strong, outputs, allow_unused=True)
    assert weak is None
    assert seen is not None
    assert seen.any()
