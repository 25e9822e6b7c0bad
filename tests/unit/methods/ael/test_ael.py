import dataclasses
from typing import cast

import pytest
import torch
import torch.nn.functional as F

from pipeline.batch import Views
from pipeline.errors import UserError
from pipeline.methods.ael.ael import AEL, Targets
from pipeline.methods.ael.sampling import DrawnCrops, zoomed
from tests.unit.methods.conftest import CLASSES, SIZE, batch, step, train_step

CPU = torch.device("cpu")


def _ael(build, **options) -> AEL:
    return cast("AEL", build("ael", **options))


def _labeled(count: int = 2) -> Views:
    return batch(count).labeled


def test_consistency_weighs_by_confidence_and_sampling_rate(build):
    """sum w CE / sum w, w = m^2 Bernoulli(r of the student's class), pixel by pixel."""
    method = _ael(build)
    method.confidence.value.copy_(torch.tensor([0.9, 0.5, 0.1, 0.3, 0.7]))
    torch.manual_seed(0)
    logits = torch.randn(2, CLASSES, 6, 6)
    said = Targets(torch.randint(0, CLASSES, (2, 6, 6)), torch.rand(2, 6, 6))
    draws = step(3).uniform_per_image("ael/labeled", (2, 6, 6), CPU)
    total = weights = 0.0
    for b, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(6)).tolist():
        m, k = float(said.confidence[b, y, x]), int(logits[b, :, y, x].argmax())
        rate = (1 - [0.9, 0.5, 0.1, 0.3, 0.7][k]) / 0.9
        if m >= 0.7 and draws[b, y, x] < rate:
            total += m**2 * float(F.cross_entropy(logits[b, :, y, x], said.label[b, y, x]))
            weights += m**2
    found = method.consistency(logits, said, "ael/labeled", step(3))
    assert float(found) == pytest.approx(total / weights, rel=1e-4)


def test_pastes_are_the_neighbours_pixels_of_the_drawn_class(build):
    method, labeled = _ael(build, paste=1.0, paste_exclude="0,1,2,4"), _labeled()
    assert labeled.mask is not None
    pasted = method.paste(labeled, step(3))
    draws = step(3).uniform_per_image("ael/paste", (2, 5), CPU)
    image, mask = zoomed(labeled.image.flip(0), labeled.mask.flip(0), draws[:, :4], (0.2, 1.0))
    taken = mask == 3  # the only class allowed
    assert taken.any()
    assert pasted.mask is not None
    assert torch.equal(pasted.mask, torch.where(taken, 3, labeled.mask))
    assert torch.equal(pasted.image, torch.where(taken[:, None], image, labeled.image))


@pytest.mark.parametrize("options", [{"paste": 0.0}, {"paste": 1.0, "paste_exclude": "0,1,2,3,4"}])
def test_nothing_to_paste_changes_nothing(options, build):
    method, labeled = _ael(build, **options), _labeled()
    pasted = method.paste(labeled, step(3))
    assert labeled.mask is not None
    assert pasted.mask is not None
    assert torch.equal(pasted.image, labeled.image)
    assert torch.equal(pasted.mask, labeled.mask)


def test_boxes_surround_the_drawn_class_if_it_is_large_enough(build):
    method = _ael(build)
    label = torch.zeros(4, SIZE, SIZE, dtype=torch.long)
    label[0, 3:9, 5:15] = 2  # 60 of 576 pixels
    label[1, 3, 3] = 2  # too small
    label[2, :20] = 2  # its box is more than half
    found = torch.tensor([True, True, True, False])
    drawn = DrawnCrops(torch.zeros(4, 4, SIZE, SIZE, dtype=torch.uint8), torch.full((4,), 2), found)
    box = method.boxes(label, drawn, step(3))
    assert torch.equal(box[0], label[0] == 2)
    for other in (1, 2):
        assert float(box[other].float().mean()) == pytest.approx(0.5, abs=0.05)
    assert not box[3].any()


def test_the_reservoir_fills_with_crops_by_the_teachers_labels(build):
    method, on = _ael(build), batch()
    assert on.unlabeled is not None
    label = torch.zeros(2, SIZE, SIZE, dtype=torch.long)
    label[1] = 3
    for index in range(8):
        method.remember(on.unlabeled, label, step(index))
    assert method.reservoir.count.tolist() == [4, 0, 0, 4, 0]
    crop = torch.cat([on.unlabeled.image, on.unlabeled.valid[:, None].to(torch.uint8)], 1)
    assert all(torch.equal(held, crop[0]) for held in method.reservoir.crops[:4])
    assert all(torch.equal(held, crop[1]) for held in method.reservoir.crops[12:16])


def test_the_first_step_mixes_nothing_and_later_ones_do(build):
    method = _ael(build)
    assert not method.partners(2, step(0)).found.any()
    train_step(method, 0)
    assert method.partners(2, step(1)).found.all()


def test_padding_is_never_learned_from(build):
    method, on = _ael(build, threshold=0.0), batch()
    assert on.unlabeled is not None
    partner = DrawnCrops(
        torch.zeros(2, 4, SIZE, SIZE, dtype=torch.uint8), torch.zeros(2, dtype=torch.long), torch.ones(2) > 0
    )
    seen = torch.cat([on.labeled.image, on.unlabeled.image, partner.crops[:, :3]])
    with torch.no_grad():
        said = method.targets(method.teacher.logits(seen), on.labeled, on.unlabeled, partner)
    assert torch.equal(said[1].confidence > 0, on.unlabeled.valid)
    assert not said[2].confidence.any()


def test_class_confidence_follows_the_students_probabilities_of_the_truth(build):
    method, on = _ael(build, paste=0.0), batch()
    assert on.labeled.mask is not None
    on = dataclasses.replace(on, labeled=dataclasses.replace(on.labeled, mask=on.labeled.mask.clamp(1, 255)))
    method(on, step(0))
    moved = method.confidence.value
    assert moved[0] == 0.5
    assert (moved[1:] != 0.5).all()
    assert (moved - 0.5).abs().max() <= 0.0005


def test_excluded_classes_are_numbers(build):
    assert _ael(build, data={"background": "none"}).allowed.tolist() == [1.0] * CLASSES
    assert _ael(build).allowed.tolist() == [0, 1, 1, 1, 1], "the background never is an object"
    assert _ael(build, paste_exclude="0, 4,99", data={"background": "2"}).allowed.tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(UserError, match=r"ael.paste_exclude: expected class numbers"):
        _ael(build, paste_exclude="road")


def test_warm_up_is_supervised_with_pastes_and_a_copied_teacher(build):
    method = _ael(build, warmup=2)
    for index in range(2):
        assert train_step(method, index).keys() == {"supervised"}
        assert all(
            torch.equal(a, b) for a, b in zip(method.teacher.parameters(), method.student.parameters(), strict=True)
        )
    assert (method.confidence.value != 0.5).any()
    assert train_step(method, 2).keys() == {"supervised", "consistency_labeled", "consistency_mixed"}


def test_the_teacher_has_the_students_batch_statistics(build):
    """Its own would be those of clean images, with which neither network learns."""
    method = _ael(build, ema_decay=0.6)
    for index in range(3):
        train_step(method, index)
    before = {name: value.clone() for name, value in method.teacher.named_buffers()}
    train_step(method, 3)
    student = dict(method.student.named_buffers())
    for name, mine in method.teacher.named_buffers():
        expected = 0.6 * before[name] + 0.4 * student[name] if "running" in name else student[name]
        torch.testing.assert_close(mine, expected)
