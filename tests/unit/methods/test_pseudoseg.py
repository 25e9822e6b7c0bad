import math
from typing import cast

import pytest
import torch
import torch.nn.functional as F

from pipeline.methods.pseudoseg import AttentiveCAM, PseudoSeg
from pipeline.models import FeatureMaps
from tests.unit.methods.conftest import CLASSES, SIZE, batch, step


@pytest.fixture
def pseudoseg(build) -> PseudoSeg:
    return cast("PseudoSeg", build("pseudoseg"))


@pytest.fixture
def cam() -> AttentiveCAM:
    torch.manual_seed(0)
    return AttentiveCAM(4, 6, CLASSES, 3, background=0)


def _feature_maps() -> FeatureMaps:
    torch.manual_seed(1)
    return FeatureMaps(torch.randn(2, 2, 12, 12), torch.randn(2, 4, 6, 6), torch.randn(2, 6, 3, 3).relu())


def test_activation_maps_are_grad_cam(cam):
    """The release's C-1 gradients of the logits, averaged over the map."""
    high, present = (
        _feature_maps().high.requires_grad_(),
        torch.tensor([[True, True, False, True], [True, False, True, True]]),
    )
    found = cam.activation(high, present)
    logits = cam.logits(high)
    for k in range(CLASSES - 1):
        (gradient,) = torch.autograd.grad(logits[:, k].sum(), high, retain_graph=True)
        weights = gradient.mean((2, 3), keepdim=True)
        expected = (weights * high).sum(1).relu() * present[:, k].view(-1, 1, 1)
        top = expected.amax((1, 2), keepdim=True)
        torch.testing.assert_close(found[:, k], torch.where(top > 0, expected / top, 0.0))
    assert not found.requires_grad


def test_attention_is_a_softmax_over_the_cells_that_show_the_image(cam):
    given, present = _feature_maps(), torch.ones(2, CLASSES - 1, dtype=torch.bool)
    valid = torch.ones(2, 12, 12, dtype=torch.bool)
    valid[0, :4] = False  # the first row of cells
    merged = []
    cam.merge = torch.nn.Identity()  # type: ignore[assignment]
    found = cam(given, present, valid)
    maps = cam.activation(given.high, present)
    mid = F.interpolate(given.mid, (3, 3), mode="bilinear", align_corners=True)
    column = torch.cat([mid, given.high], 1)
    for b in range(2):
        q, k = (w.weight.flatten(1) @ column[b].flatten(1) for w in (cam.query, cam.key))
        cells = [i for i in range(9) if b == 1 or i >= 3]
        rows = []
        for i in range(9):
            share = torch.stack([(q[:, i] @ k[:, j]) / math.sqrt(3) for j in cells]).softmax(0)
            rows.append(sum(s * maps[b].flatten(1)[:, j] for s, j in zip(share, cells, strict=True)))
        refined = torch.stack(rows, 1).view(-1, 3, 3) + maps[b]
        merged.append(torch.cat([2 - refined.amax(0, keepdim=True), refined]))
    torch.testing.assert_close(found, torch.stack(merged))


def test_the_background_takes_its_own_place_and_without_one_every_class_has_a_map():
    given, valid = _feature_maps(), torch.ones(2, 12, 12, dtype=torch.bool)
    maps = {}
    for background in (0, 2, None):
        torch.manual_seed(0)
        cam = AttentiveCAM(4, 6, CLASSES, 3, background)
        cam.merge = torch.nn.Identity()  # type: ignore[assignment]
        present = torch.ones(2, CLASSES - (background is not None), dtype=torch.bool)
        assert cam.logits(given.high).shape == present.shape
        maps[background] = cam(given, present, valid)
        assert maps[background].shape == (2, CLASSES, 3, 3)
    assert torch.equal(maps[2], maps[0][:, [1, 2, 0, 3, 4]])


@pytest.mark.parametrize("background", ["0", "3", "none"])
def test_the_classifier_is_asked_for_the_objects_alone(build, background):
    method, on = build("pseudoseg", data={"background": background}), batch()
    assert on.labeled.mask is not None
    on.labeled.mask[on.labeled.mask == 1] = 255
    found = method(on, step(3)).terms["classifier"]
    high = method.student.encode(on.labeled.image).high
    objects = [k for k in range(CLASSES) if str(k) != background]
    shown = torch.tensor([[float((mask == k).any()) for k in objects] for mask in on.labeled.mask])
    expected = F.binary_cross_entropy(method.cam.logits(high).sigmoid(), shown)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_image_that_is_padding_alone_stays_finite(cam):
    found = cam(_feature_maps(), torch.ones(2, CLASSES - 1, dtype=torch.bool), torch.zeros(2, 12, 12, dtype=torch.bool))
    assert found.isfinite().all()


def test_the_attention_trains_neither_encoder_nor_classifier(pseudoseg):
    pseudoseg(batch(), step(3)).terms["attention"].backward()
    assert not any(p.grad is not None and p.grad.any() for p in pseudoseg.student.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in pseudoseg.cam.classifier.parameters())
    assert pseudoseg.cam.query.weight.grad is not None


def test_consistency_is_soft_cross_entropy_outside_hole_and_padding(pseudoseg):
    on = batch()
    assert on.unlabeled is not None
    terms = pseudoseg(on, step(3)).terms
    target = pseudoseg.pseudo_labels(on.unlabeled, step(3).world)
    torch.testing.assert_close(target.sum(1), torch.ones_like(target[:, 0]))
    strong, valid = pseudoseg.strong(on.unlabeled, step(3))
    logits = pseudoseg.student(strong).logits
    size, losses = logits.shape[2:], []
    for b in range(2):
        for y in range(size[0]):
            for x in range(size[1]):
                if valid[b, y * SIZE // size[0], x * SIZE // size[1]]:
                    losses.append(-(target[b, :, y, x] * logits[b, :, y, x].log_softmax(0)).sum())
    torch.testing.assert_close(terms["consistency"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_the_strong_view_has_a_hole_in_the_mean_colour(pseudoseg):
    unlabeled = batch().unlabeled
    assert unlabeled is not None
    image, valid = pseudoseg.strong(unlabeled, step(3))
    hole = unlabeled.valid & ~valid
    assert 0 < int(hole.sum()) <= 2 * 25  # a fifth of 24 is 5
    assert (image.movedim(1, -1)[hole] == torch.tensor([124, 116, 104])).all()
    assert torch.equal(image.movedim(1, -1)[valid], unlabeled.strong[0].movedim(1, -1)[valid])
