"""Each measure against its definition, image by image and pixel by pixel."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from torch import Tensor

from pipeline.inference import measures as module
from pipeline.inference.measures import BINS, Bad, Tally, boundary, measures

CLASSES = 5
SIZES = [(3, 31, 47), (2, 60, 90), (1, 1, 9), (1, 200, 130)]
"""Batches of images; the boundaries of the last reach further than one pixel."""


def batch(seed: int, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Probabilities of a network that is often right, and a truth of blobs that shows neither class 3 nor class 4."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 3, (size[0], 1, 4, 5), generator=generator).float()
    target = torch.nn.functional.interpolate(coarse, size[1:])[:, 0].byte()
    target[torch.rand(size, generator=generator) < 0.1] = 255
    noise = torch.randn(size[0], CLASSES, *size[1:], generator=generator)
    noise[:, 4] -= 100  # class 3 is predicted here and there, class 4 nowhere
    hint = torch.nn.functional.one_hot(target.long().clamp_max(CLASSES - 1), CLASSES).permute(0, 3, 1, 2)
    return (noise + 2 * hint).softmax(1), target


BATCHES = [batch(seed, size) for seed, size in enumerate(SIZES)]


def tally_of(batches: list[tuple[Tensor, Tensor]], name: str = "") -> Tally:
    tally = Tally(CLASSES)
    for number, (probability, target) in enumerate(batches):
        ids = [f"{name}{number}-{at}" for at in range(len(target))]
        tally.update(ids, probability, probability.argmax(1), target)
    return tally


@pytest.fixture(scope="module")
def pixels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, prediction and confidence of all scored pixels, [N]."""
    found = [(t.numpy(), p.argmax(1).numpy(), p.max(1).values.numpy()) for p, t in BATCHES]
    keep = [target != 255 for target, _, _ in found]
    truth, seen, sure = (
        np.concatenate([each[at][mask] for each, mask in zip(found, keep, strict=True)]) for at in range(3)
    )
    return truth, seen, sure


def test_measures_of_areas_are_their_definitions(pixels):
    truth, seen, _ = pixels
    found = measures(tally_of(BATCHES))
    for at in range(CLASSES):
        both, either = np.sum((truth == at) & (seen == at)), np.sum((truth == at) | (seen == at))
        areas = np.sum(truth == at), np.sum(seen == at)
        assert found.iou[at] == (pytest.approx(both / either) if either else None)
        assert found.accuracy[at] == (pytest.approx(both / areas[0]) if areas[0] else None)
        assert found.dice[at] == (pytest.approx(2 * both / sum(areas)) if sum(areas) else None)
    assert found.iou[3] == 0  # predicted where it never is
    assert found.accuracy[3] is None
    assert found.iou[4] is found.dice[4] is found.boundary_iou[4] is None
    assert found.miou == pytest.approx(np.mean([each for each in found.iou if each is not None]))
    assert found.pixel_accuracy == pytest.approx(np.mean(truth == seen))
    weighed = [np.mean(truth == at) * (found.iou[at] or 0) for at in range(3)]
    assert found.frequency_weighted_iou == pytest.approx(sum(weighed))
    zero = measures(tally_of(BATCHES), "zero")
    assert zero.iou[4] == 0
    assert zero.miou == pytest.approx(found.miou * 4 / 5)


def test_calibration_error_is_its_definition(pixels):
    truth, seen, sure = pixels
    error = 0.0
    for at in range(BINS):
        inside = (sure > at / BINS) & (sure <= (at + 1) / BINS)
        if inside.any():
            error += inside.mean() * abs((truth == seen)[inside].mean() - sure[inside].mean())
    tally = tally_of(BATCHES)
    assert measures(tally).calibration_error == pytest.approx(error, abs=1e-6)
    assert error > 0.01
    assert sum(each.pixels for each in tally.reliability) == len(truth)


@pytest.mark.parametrize("size", [(1, 200, 130), (2, 31, 47), (1, 1, 9), (1, 2, 2)])
def test_boundaries_are_what_erosion_takes_away(size):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (size[0], 1, 2, 3), generator=generator).float()
    labels = torch.nn.functional.interpolate(labels, size[1:])[:, 0].long()
    reach = max(1, round(0.02 * np.sqrt(size[1] ** 2 + size[2] ** 2)))
    found = boundary(labels).numpy()
    for one, edge in zip(labels.numpy(), found, strict=True):
        for at in range(3):
            mask = one == at
            inner = np.asarray(binary_erosion(mask, np.ones((3, 3)), iterations=reach, border_value=0), bool)
            assert np.array_equal(edge & mask, mask & ~inner)
    if size[1] > 100:
        assert reach == 5
        assert 0 < found.mean() < 1


def test_boundary_iou_is_its_definition_pixel_by_pixel():
    common, either = np.zeros(CLASSES), np.zeros(CLASSES)
    for probability, target in BATCHES[:3]:
        for seen, truth in zip(probability.argmax(1).numpy(), target.numpy(), strict=True):
            reach = max(1, round(0.02 * np.hypot(*truth.shape)))
            seen = np.where(truth == 255, 255, seen)
            for at in range(CLASSES):
                true, said = (slow_boundary(each == at, reach) for each in (truth, seen))
                common[at] += np.sum(true & said)
                either[at] += np.sum(true | said)
    tally = tally_of(BATCHES[:3])
    assert tally.boundary.tolist() == [common.tolist(), either.tolist()]
    found = measures(tally)
    expected = [a / b if b else None for a, b in zip(common, either, strict=True)]
    assert list(found.boundary_iou) == expected
    assert found.mean_boundary_iou == pytest.approx(np.mean([each for each in expected if each is not None]))


def slow_boundary(mask: np.ndarray, reach: int) -> np.ndarray:
    edge = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        square = [(y + down, x + right) for down in range(-reach, reach + 1) for right in range(-reach, reach + 1)]
        inside = [0 <= a < mask.shape[0] and 0 <= b < mask.shape[1] and mask[a, b] for a, b in square]
        edge[y, x] = not all(inside)
    return edge


def test_what_is_predicted_at_ignored_pixels_changes_nothing():
    (probability, target), other = BATCHES[3], batch(9, SIZES[3])[0]
    changed = torch.where((target == 255)[:, None], other, probability)
    assert not torch.equal(changed.argmax(1), probability.argmax(1))
    one, two = tally_of([(probability, target)]), tally_of([(changed, target)])
    assert one.images == two.images
    for first, second in ((one.confusion.matrix, two.confusion.matrix), (one.boundary, two.boundary)):
        assert torch.equal(first, second)
    assert torch.equal(one.bins, two.bins)


def test_a_perfect_network_scores_one_and_an_empty_set_nothing():
    target = BATCHES[1][1]
    sure = torch.nn.functional.one_hot(target.long().clamp_max(4), CLASSES).permute(0, 3, 1, 2).float()
    found = measures(tally_of([(sure, target)]))
    assert found.iou == found.boundary_iou == found.accuracy == found.dice == (1.0, 1.0, 1.0, None, None)
    assert (found.miou, found.mean_boundary_iou, found.frequency_weighted_iou, found.calibration_error) == (1, 1, 1, 0)
    empty = tally_of([(sure, torch.full_like(target, 255))])
    assert empty.images == {}
    assert measures(empty).mean_boundary_iou == measures(empty).calibration_error == measures(empty).miou == 0


def test_parts_add_up_to_the_whole_in_any_order_and_batch():
    whole = tally_of(BATCHES)
    single = [
        (probability[at : at + 1], target[at : at + 1]) for probability, target in BATCHES for at in range(len(target))
    ]
    parts = Tally(CLASSES)
    for number, one in reversed(list(enumerate(single))):
        parts.add(tally_of([one], f"{number}/"))
    assert torch.equal(parts.confusion.matrix, whole.confusion.matrix)
    assert torch.equal(parts.boundary, whole.boundary)
    assert torch.equal(parts.bins, whole.bins)
    assert sorted(parts.images.values()) == sorted(whole.images.values())
    assert len(parts.images) == len(single)


def test_the_worst_images_are_kept(monkeypatch):
    monkeypatch.setattr(module, "WORST", 3)
    picture = np.zeros((1, 1, 3), np.uint8)
    one, other = Tally(CLASSES), Tally(CLASSES)
    for tally, scores in ((one, (0.5, 0.2, 0.9, 0.3)), (other, (0.2, 0.4))):
        for at, score in enumerate(scores):
            name = f"{'b' if tally is one else 'a'}{at}"
            if tally.admits(score, name):
                tally.keep([Bad(score, name, picture)])
    assert [each.id for each in one.worst] == ["b1", "b3", "b0"]
    assert not one.admits(0.6, "x")
    assert one.admits(0.1, "x")
    one.add(other)
    assert [each.id for each in one.worst] == ["a0", "b1", "b3"]
