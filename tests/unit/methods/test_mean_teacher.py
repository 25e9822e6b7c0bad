import math
from typing import cast

import pytest
import torch

from pipeline.methods.mean_teacher import MeanTeacher
from tests.unit.methods.conftest import CLASSES, SIZE, batch, full, noted, step, train_step


def _trained(build, **options) -> MeanTeacher:
    """After three steps, so that teacher and student differ."""
    method = cast("MeanTeacher", build("mean_teacher", **options))
    for index in range(3):
        train_step(method, index)
    return method


@pytest.mark.parametrize("on_logits", [False, True])
def test_the_consistency_pixel_by_pixel(build, on_logits):
    method, on = _trained(build, on_logits=on_logits, lambda_u=7.0, ramp=10), batch(seed=3)
    unlabeled = method.sides(on)[1]
    found = method(on, step(3))
    with torch.no_grad():
        student = full(method.student(unlabeled.image).logits)
        teacher = full(method.teacher.eval()(unlabeled.image).logits)
    if not on_logits:
        student, teacher = student.softmax(1), teacher.softmax(1)
    errors = [
        float((student[b, c, y, x] - teacher[b, c, y, x]) ** 2)
        for b, y, x in unlabeled.valid.nonzero().tolist()
        for c in range(CLASSES)
    ]
    ramp = math.exp(-5 * (1 - 3 / 10) ** 2)
    assert float(found.terms["consistency"].detach()) == pytest.approx(7 * ramp * sum(errors) / len(errors), rel=1e-4)
    assert float(found.logs["consistency_weight"]) == pytest.approx(7 * ramp)


def test_the_teacher_is_an_average_of_weights_and_statistics(build):
    method = _trained(build, ema_decay=0.6)
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    train_step(method, 3)  # 1 - 1/4 is above the cap
    student = method.student.state_dict()
    for name, mine in method.teacher.state_dict().items():
        expected = 0.6 * before[name] + 0.4 * student[name] if mine.is_floating_point() else student[name]
        torch.testing.assert_close(mine, expected)


def test_forward_leaves_the_teacher_alone(build):
    method = _trained(build)
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    method(batch(), step(3))
    for name, value in method.teacher.state_dict().items():
        assert torch.equal(value, before[name])


def test_noise_is_the_students_alone_and_has_the_deviation_asked_for(build):
    method, on = _trained(build, input_noise=5.0), batch(seed=3)
    of_student, of_teacher = noted(method.student), noted(method.teacher)
    unlabeled = method.sides(on)[1]
    method(on, step(3))
    assert [torch.equal(image, unlabeled.image) for image in of_teacher] == [True]
    labeled, noisy = of_student
    assert torch.equal(labeled, on.labeled.image)
    noise = noisy - unlabeled.image
    assert noise.shape == (2, 3, SIZE, SIZE)
    assert float(noise.std()) == pytest.approx(5, rel=0.05)
    assert abs(float(noise.mean())) < 0.4
