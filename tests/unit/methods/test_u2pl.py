import dataclasses
import logging
from typing import Any, cast

import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.methods.u2pl import U2PL
from pipeline.models import Prediction, upsample
from pipeline.ops.mixing import cutmix_masks
from tests.unit.methods.conftest import CLASSES, SIZE, batch, step, train_step

WARM = 2


@pytest.fixture
def u2pl(build) -> U2PL:
    return cast("U2PL", build("u2pl"))


def _differ(method: U2PL) -> bool:
    return any(
        not torch.equal(a, b) for a, b in zip(method.teacher.parameters(), method.student.parameters(), strict=True)
    )


def test_the_teacher_is_a_copy_during_warm_up_and_an_average_after(u2pl):
    assert not _differ(u2pl)
    for index in range(WARM + 1):  # the last copy is made at the first step that used the teacher
        before = [p.clone() for p in u2pl.student.parameters()]
        train_step(u2pl, index)
        assert any(not torch.equal(a, b) for a, b in zip(before, u2pl.student.parameters(), strict=True))
        assert not _differ(u2pl)
        for mine, other in zip(u2pl.teacher.buffers(), u2pl.student.buffers(), strict=True):
            assert torch.equal(mine, other)
    for index, decay in ((WARM + 1, 1 / 2), (WARM + 2, 2 / 3)):
        before = [p.clone() for p in u2pl.teacher.parameters()]
        train_step(u2pl, index)
        for old, mine, other in zip(before, u2pl.teacher.parameters(), u2pl.student.parameters(), strict=True):
            torch.testing.assert_close(mine, decay * old + (1 - decay) * other)
    assert _differ(u2pl)


def test_the_teacher_gets_no_gradient(u2pl):
    assert not any(p.requires_grad for p in u2pl.teacher.parameters())
    trained = {id(p) for group in u2pl.param_groups() for p in group["params"]}
    assert not trained & {id(p) for p in u2pl.teacher.parameters()}


def test_warm_up_is_supervised_alone_and_leaves_the_bank_empty(u2pl):
    for index in range(WARM):
        assert train_step(u2pl, index).keys() == {"supervised"}
    assert not u2pl.bank.count.any()
    assert train_step(u2pl, WARM).keys() == {"supervised", "unsupervised", "contrastive"}
    assert u2pl.bank.count.any()


def test_lambda_c_weighs_the_contrastive_term(build):
    terms = []
    for weight in (0.1, 0.3):
        torch.manual_seed(0)
        terms.append(build("u2pl", lambda_c=weight)(batch(), step(5)).terms)
    torch.testing.assert_close(3 * terms[0]["contrastive"], terms[1]["contrastive"])
    assert terms[0]["contrastive"] > 0
    assert torch.equal(terms[0]["unsupervised"], terms[1]["unsupervised"])


def test_pseudo_labels_are_the_evaluating_teachers_on_clean_images(build):
    method = cast("U2PL", build("u2pl", cutmix=0.0))
    for index in range(4):
        train_step(method, index)
    unlabeled = batch(seed=9).unlabeled
    assert unlabeled is not None
    before = {name: value.clone() for name, value in method.teacher.named_buffers()}
    mixed = method._teach(unlabeled, step(4))
    with torch.no_grad():
        logits = upsample(method.teacher.eval()(unlabeled.image).logits, (SIZE, SIZE))
    expected = logits.argmax(1).masked_fill(~unlabeled.valid, 255)
    assert torch.equal(mixed.label, expected)
    assert torch.equal(mixed.images, unlabeled.image)
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.named_buffers())


class _ByBrightness(nn.Module):
    """A teacher that knows the class of each pixel: the images' brightness is in steps of 40."""

    def forward(self, image: torch.Tensor) -> Prediction:
        label = (image[:, 0].long() // 40).clamp_max(CLASSES - 1)
        return Prediction(nn.functional.one_hot(label, CLASSES).movedim(-1, 1).float(), None, None)


def test_cutmix_moves_image_and_label_together(build):
    """Validity too: what is ignored stays with its pixels."""
    method = cast("U2PL", build("u2pl", cutmix=1.0))
    method.teacher = _ByBrightness()  # type: ignore[assignment]
    unlabeled = batch(4, seed=9).unlabeled
    assert unlabeled is not None
    unlabeled.valid[::2, :, 3:9] = False
    clean = (unlabeled.image[:, 0].long() // 40).clamp_max(CLASSES - 1).masked_fill(~unlabeled.valid, 255)
    mixed = method._teach(unlabeled, step(4))
    box = cutmix_masks(step(4).uniform_per_image("cutmix", (4, 3), torch.device("cpu")), (SIZE, SIZE))
    partner = torch.tensor([1, 0, 3, 2])
    assert torch.equal(mixed.label, torch.where(box, clean[partner], clean))
    assert torch.equal(mixed.images, torch.where(box[:, None], unlabeled.image[partner], unlabeled.image))
    assert not torch.equal(mixed.label, clean)


def test_cutmix_probability(build):
    method = cast("U2PL", build("u2pl", cutmix=0.5))
    unlabeled = batch(2).unlabeled
    assert unlabeled is not None
    used = [not torch.equal(method._teach(unlabeled, step(index)).images, unlabeled.image) for index in range(60)]
    assert 18 <= sum(used) <= 42


def test_the_teachers_second_look_is_in_training_mode(u2pl):
    """Entropy and keys come from batch statistics, which move the teacher's own."""
    for index in range(WARM):
        train_step(u2pl, index)
    before = {name: value.clone() for name, value in u2pl.teacher.named_buffers()}
    u2pl(batch(), step(WARM))
    moved = {name for name, value in u2pl.teacher.named_buffers() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in moved)


def test_logs_describe_the_step(u2pl):
    losses = u2pl(batch(), step(5))
    logs: dict[str, Any] = {name: value.tolist() for name, value in losses.logs.items()}
    assert 0 < logs["kept"] < 1
    assert logs["entropy_threshold"] > 0
    for name in ("anchors", "negatives", "bank_fill", "pseudo_labels"):
        assert len(logs[name]) == CLASSES
    assert sum(logs["pseudo_labels"]) == pytest.approx(logs["kept"] * 2 * SIZE * SIZE)
    assert all(0 <= fill <= 1 for fill in logs["bank_fill"])


def test_nothing_random_depends_on_what_was_drawn_before(u2pl, build):
    torch.manual_seed(0)
    one = u2pl(batch(), step(5)).terms
    torch.rand(100)
    assert build("u2pl")(batch(), step(5)).terms == one


def test_two_classes_clamp_the_ranks_and_say_so(build, caplog):
    with caplog.at_level(logging.WARNING, "pipeline"):
        method = cast("U2PL", build("u2pl", classes=2))
    assert "u2pl.r_l 3 leaves no negatives with 2 classes: using 1" in caplog.text
    assert method.options.r_l == 1
    for index in range(5):
        terms = train_step(method, index, batch(seed=index, classes=2))
        assert all(value.isfinite() for value in terms.values())
    assert method.bank.count.any()


def test_enough_classes_are_not_clamped(build, caplog):
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert cast("U2PL", build("u2pl", classes=4)).options.r_l == 3
    assert not caplog.text


def test_it_says_what_a_batch_lacks(u2pl):
    on = batch()
    for lacking in (Batch(on.labeled, None), Batch(dataclasses.replace(on.labeled, mask=None), on.unlabeled)):
        with pytest.raises(ValueError, match="U2PL needs masks"):
            u2pl(lacking, step(0))


def test_background_has_a_queue_of_its_own_size(u2pl):
    assert u2pl.bank.size.tolist() == [30] + [20] * (CLASSES - 1)
