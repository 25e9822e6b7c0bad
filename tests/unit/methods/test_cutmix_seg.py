from typing import cast

import pytest
import torch

from pipeline.batch import Batch
from pipeline.methods.cutmix_seg import CutMixSeg
from pipeline.ops.mixing import box_masks
from tests.unit.methods.conftest import CPU, SIZE, batch, full, noted, step, train_step


def _trained(build, **options) -> CutMixSeg:
    method = cast("CutMixSeg", build("cutmix_seg", **options))
    for index in range(3):
        train_step(method, index)
    return method


def _expected(method: CutMixSeg, on: Batch, threshold: float, strong: bool) -> tuple[float, float]:
    """Confident share and mean squared distance, pixel by pixel."""
    unlabeled, count = method.sides(on)[1], 4
    view = unlabeled.strong[0] if strong else unlabeled.image
    box = box_masks(step(3).uniform_per_image("cutmix", (count, 1, 4), CPU), (SIZE, SIZE), (0.5, 0.5))
    with torch.no_grad():
        teacher = full(method.teacher.eval()(unlabeled.image).logits).softmax(1)
    image, target, valid = view.clone(), teacher.clone(), unlabeled.valid.clone()
    for b, y, x in box.nonzero().tolist():
        other = (1, 0, 3, 2)[b]
        image[b, :, y, x] = view[other, :, y, x]
        target[b, :, y, x] = teacher[other, :, y, x]
        valid[b, y, x] = unlabeled.valid[other, y, x]
    with torch.no_grad():
        student = full(method.student(image).logits).softmax(1)
    pixels = valid.nonzero().tolist()
    confident = sum(float(target[b, :, y, x].max()) >= threshold for b, y, x in pixels) / len(pixels)
    distance = sum(float((student[b, :, y, x] - target[b, :, y, x]).square().sum()) for b, y, x in pixels)
    return confident, distance / valid.numel()


@pytest.mark.parametrize("strong", [True, False])
def test_the_consistency_pixel_by_pixel(build, strong):
    method, on = _trained(build, threshold=0.22, lambda_u=3.0, strong=strong), batch(4, seed=3)
    method.sides(on)[1].valid[1, :, 3:9] = False
    found = method(on, step(3))
    confident, distance = _expected(method, on, 0.22, strong)
    assert 0 < confident < 1
    assert float(found.logs["confident"]) == pytest.approx(confident)
    assert float(found.terms["consistency"].detach()) == pytest.approx(3 * confident * distance, rel=1e-4)


def test_nobody_confident_means_no_consistency(build):
    method = _trained(build, threshold=1.0)
    losses = method(batch(4), step(3))
    assert losses.terms["consistency"] == 0
    assert losses.terms["consistency"].requires_grad


def test_the_teacher_sees_clean_whole_images(build):
    method, on = _trained(build), batch(4, seed=3)
    seen = noted(method.teacher)
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    method(on, step(3))
    assert len(seen) == 1
    assert torch.equal(seen[0], method.sides(on)[1].image)
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())
