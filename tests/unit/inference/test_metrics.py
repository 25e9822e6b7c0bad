from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.inference.evaluate import ConfusionMatrix

GOLDEN = Path(__file__).parents[2] / "data/golden/miou.npz"


def _matrix(pred: list[int], target: list[int], classes: int = 3) -> ConfusionMatrix:
    matrix = ConfusionMatrix(classes)
    matrix.update(torch.tensor(pred), torch.tensor(target))
    return matrix


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_golden(dtype):
    golden = np.load(GOLDEN)
    matrix = ConfusionMatrix(int(golden["num_classes"]))
    for pred, target in zip(golden["pred"], golden["target"], strict=True):
        matrix.update(torch.from_numpy(pred).to(dtype), torch.from_numpy(target).to(dtype))
    assert matrix.intersection.tolist() == golden["intersection"].tolist()
    assert matrix.union.tolist() == golden["union"].tolist()
    assert matrix.matrix.sum(1).tolist() == golden["target_area"].tolist()
    scores = matrix.scores(absent="zero")
    assert scores.iou == pytest.approx(golden["iou"].tolist(), abs=1e-6)
    assert scores.miou == pytest.approx(float(golden["miou"]), abs=1e-6)


def test_rows_are_targets_and_ignored_pixels_do_not_count():
    matrix = _matrix(pred=[0, 1, 2, 2, 1], target=[0, 1, 1, 2, 255])
    assert matrix.matrix.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    scores = matrix.scores()
    assert scores.iou == (1.0, 0.5, 0.5)
    assert scores.miou == pytest.approx(2 / 3)
    assert scores.pixel_accuracy == 0.75


def test_an_absent_class_is_left_out():
    scores = _matrix(pred=[0, 1], target=[0, 1]).scores()
    assert scores.iou == (1.0, 1.0, None)
    assert scores.miou == 1.0


def test_an_absent_class_counts_zero_if_asked():
    scores = _matrix(pred=[0, 1], target=[0, 1]).scores(absent="zero")
    assert scores.iou == (1.0, 1.0, 0.0)
    assert scores.miou == pytest.approx(2 / 3)


def test_a_class_that_is_only_predicted_counts_zero():
    scores = _matrix(pred=[0, 2], target=[0, 0]).scores()
    assert scores.iou == (0.5, None, 0.0)
    assert scores.miou == 0.25


def test_nothing_scored():
    scores = _matrix(pred=[0, 1], target=[255, 255]).scores()
    assert scores == type(scores)(miou=0.0, iou=(None, None, None), pixel_accuracy=0.0)


@pytest.mark.parametrize("target", [3, 4, 200])
def test_a_target_out_of_range_is_an_error(target):
    with pytest.raises(ValueError, match="neither one of 3 classes nor 255"):
        _matrix(pred=[0], target=[target])


def test_alone_all_reduce_changes_nothing():
    matrix = _matrix(pred=[0, 1], target=[0, 2])
    before = matrix.matrix.clone()
    matrix.all_reduce()
    assert torch.equal(matrix.matrix, before)
