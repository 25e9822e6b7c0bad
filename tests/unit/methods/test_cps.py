from typing import cast

import pytest
import torch
from torch import Tensor

from pipeline.methods.cps import CPS
from pipeline.ops.mixing import box_masks
from tests.unit.methods.conftest import CPU, SIZE, batch, full, step, train_step


def _trained(build, **options) -> CPS:
    method = cast("CPS", build("cps", **options))
    for index in range(3):
        train_step(method, index)
    return method


def _cross_entropy(logits: Tensor, label: Tensor, valid: Tensor) -> float:
    """Mean over the valid pixels, one by one."""
    losses = [-float(logits[b, :, y, x].log_softmax(0)[label[b, y, x]]) for b, y, x in valid.nonzero().tolist()]
    return sum(losses) / len(losses)


def _scores(method: CPS, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [full(network(image).logits) for network in (method.first, method.second)]


def test_cross_supervision_of_all_images_without_cutmix(build):
    method, on = _trained(build, cutmix=False, lambda_cps=1.5), batch(seed=3)
    unlabeled = method.sides(on)[1]
    found = method(on, step(3)).terms["cross"]
    sides = [_scores(method, side.image) for side in (on.labeled, unlabeled)]
    one, two = (torch.cat(each) for each in zip(*sides, strict=True))
    valid = torch.cat([on.labeled.valid, unlabeled.valid])
    expected = _cross_entropy(one, two.argmax(1), valid) + _cross_entropy(two, one.argmax(1), valid)
    assert float(found.detach()) == pytest.approx(1.5 * expected, rel=1e-4)


def test_cross_supervision_of_mixed_images_with_cutmix(build):
    method, on = _trained(build, lambda_cps=0.7), batch(4, seed=3)
    unlabeled = method.sides(on)[1]
    unlabeled.valid[2, 5:9] = False
    found = method(on, step(3)).terms["cross"]

    box = box_masks(step(3).uniform_per_image("cutmix", (4, 3, 4), CPU), (SIZE, SIZE), (0.25, 0.5))
    clean = [score.argmax(1) for score in _scores(method, unlabeled.image)]
    image, valid = unlabeled.image.clone(), unlabeled.valid.clone()
    labels = [label.clone() for label in clean]
    for b, y, x in box.nonzero().tolist():
        other = (1, 0, 3, 2)[b]
        image[b, :, y, x] = unlabeled.image[other, :, y, x]
        valid[b, y, x] = unlabeled.valid[other, y, x]
        for mixed, label in zip(labels, clean, strict=True):
            mixed[b, y, x] = label[other, y, x]
    one, two = _scores(method, image)
    expected = _cross_entropy(one, labels[1], valid) + _cross_entropy(two, labels[0], valid)
    assert float(found.detach()) == pytest.approx(0.7 * expected, rel=1e-4)


def test_the_two_networks_begin_with_different_heads(build):
    method = cast("CPS", build("cps"))
    one, two = (network.get_parameter("decoder.classifier.weight") for network in (method.first, method.second))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("cutmix", [False, True])
def test_each_network_learns_from_its_own_labels_of_the_labeled_images(build, cutmix):
    method, on = _trained(build, cutmix=cutmix), batch(seed=3)
    method.zero_grad()
    method(on, step(3)).terms["supervised"].backward()
    assert any(p.grad is not None and p.grad.any() for p in method.first.parameters())
    assert all(p.grad is None or not p.grad.any() for p in method.second.parameters())


def test_both_are_trained_and_the_first_is_the_result(build):
    method = cast("CPS", build("cps"))
    assert next(iter(method.networks().values())) is method.first
    trained = {id(p) for group in method.param_groups() for p in group["params"]}
    assert trained == {id(p) for p in method.parameters()}
