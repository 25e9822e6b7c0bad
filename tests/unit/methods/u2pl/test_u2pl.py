import copy
import dataclasses
import logging
from typing import Any, cast

import pytest
import torch
from torch import nn

from pipeline.batch import Batch, Views
from pipeline.config.options import U2PLOptions
from pipeline.errors import UserError
from pipeline.methods.u2pl import u2pl as u2pl_module
from pipeline.methods.u2pl.u2pl import U2PL
from pipeline.models import Prediction, upsample
from pipeline.ops.grid import shrink
from pipeline.ops.mixing import cutmix_masks
from pipeline.ops.world import World
from tests.unit.methods.conftest import CLASSES, SIZE, TOTAL, batch, step, train_step

WARM = 2


@pytest.fixture
def u2pl(build) -> U2PL:
    return cast("U2PL", build("u2pl"))


def _sides(count: int = 2, seed: int = 0) -> tuple[Views, Views]:
    on = batch(count, seed=seed)
    assert on.unlabeled is not None
    return on.labeled, on.unlabeled


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
    method = cast("U2PL", build("u2pl", mix_share=0.0))
    for index in range(4):
        train_step(method, index)
    labeled, unlabeled = _sides(seed=9)
    with torch.no_grad():
        logits = upsample(method.teacher.eval()(unlabeled.image).logits, (SIZE, SIZE))
    taught = method.targets(labeled, unlabeled, step(4))
    assert torch.equal(taught.label, logits.argmax(1).masked_fill(~unlabeled.valid, 255))
    assert torch.equal(taught.images, unlabeled.image)


def test_one_pass_labels_and_scores_the_clean_images_in_one_look(build):
    """Labels, entropy and keys come from the same outputs, moved as the images are."""
    method = cast("U2PL", build("u2pl", mix_share=1.0, teacher_passes=1))
    for index in range(4):
        train_step(method, index)
    labeled, unlabeled = _sides(seed=9)
    same = copy.deepcopy(method.teacher).train()
    with torch.no_grad():
        clean = same(torch.cat([labeled.image, unlabeled.image]))
    taught = method.targets(labeled, unlabeled, step(4))
    box = cutmix_masks(step(4).uniform_per_image("cutmix", (2, 3), torch.device("cpu")), (SIZE, SIZE))
    label = upsample(clean.logits[2:], (SIZE, SIZE)).argmax(1).masked_fill(~unlabeled.valid, 255)
    assert torch.equal(taught.label, torch.where(box, label.flip(0), label))
    small = box[:, ::2, ::2]
    pairs = zip(taught.teacher[:2], clean[:2], strict=True)  # logits and features
    for found, output in pairs:
        assert found is not None
        assert output is not None
        assert torch.equal(found[:2], output[:2])
        assert torch.equal(found[2:], torch.where(small[:, None], output[2:].flip(0), output[2:]))
    assert all(torch.equal(a, b) for a, b in zip(method.teacher.buffers(), same.buffers(), strict=True))


class _ByBrightness(nn.Module):
    """A teacher that knows the class of each pixel: the images' brightness is in steps of 40."""

    def forward(self, image: torch.Tensor) -> Prediction:
        label = (image[:, 0].long() // 40).clamp_max(CLASSES - 1)
        logits = nn.functional.one_hot(label, CLASSES).movedim(-1, 1).float()
        return Prediction(logits, logits, None)

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        return self(image).logits


def test_cutmix_moves_image_and_label_together(build):
    """Validity too: what is ignored stays with its pixels."""
    method = cast("U2PL", build("u2pl", mix_share=1.0))
    method.teacher = _ByBrightness()  # type: ignore[assignment]
    labeled, unlabeled = _sides(4, seed=9)
    unlabeled.valid[::2, :, 3:9] = False
    clean = (unlabeled.image[:, 0].long() // 40).clamp_max(CLASSES - 1).masked_fill(~unlabeled.valid, 255)
    mixed = method.targets(labeled, unlabeled, step(4))
    box = cutmix_masks(step(4).uniform_per_image("cutmix", (4, 3), torch.device("cpu")), (SIZE, SIZE))
    partner = torch.tensor([1, 0, 3, 2])
    assert torch.equal(mixed.label, torch.where(box, clean[partner], clean))
    assert torch.equal(mixed.images, torch.where(box[:, None], unlabeled.image[partner], unlabeled.image))
    assert not torch.equal(mixed.label, clean)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    """What each step hands to the contrast: see `make_pixels`."""
    calls: list[tuple[torch.Tensor, ...]] = []
    make = u2pl_module.make_pixels
    monkeypatch.setattr(u2pl_module, "make_pixels", lambda *args: calls.append(args) or make(*args))
    return calls


def _padded(seed: int = 9) -> Batch:
    """Four images of each side; of the unlabeled ones a half, a third and an eighth are padding, differently."""
    on = batch(4, seed=seed)
    assert on.unlabeled is not None
    on.unlabeled.valid[0, 12:], on.unlabeled.valid[1, :, 16:], on.unlabeled.valid[3, :3] = False, False, False
    return on


@pytest.mark.parametrize("mix", ["cutmix", "none", "cutout"])
def test_the_unsupervised_loss_pixel_by_pixel_with_padding(build, mix, given):
    """Sum of the kept pixels' cross entropies x shown / kept^2; what is cut out is shown, padding is not."""
    method, on = cast("U2PL", build("u2pl", mix=mix, mix_share=1.0)), _padded()
    for index in range(4):
        train_step(method, index)
    unlabeled = method.sides(on)[1]
    found = method(on, step(4)).terms["unsupervised"]
    student, teacher, _, label, *_ = given[-1]
    logits, p = (upsample(each.logits[4:].detach(), (SIZE, SIZE)) for each in (student, teacher))
    entropy = -(p.softmax(1) * p.log_softmax(1)).sum(1)
    gamma = torch.quantile(entropy[label != 255], 1 - 0.2 * (1 - 4 / TOTAL))
    kept = (label != 255) & (entropy < gamma)
    shown = unlabeled.valid
    if mix == "cutmix":
        box = cutmix_masks(step(4).uniform_per_image("cutmix", (4, 3), torch.device("cpu")), (SIZE, SIZE))
        shown = torch.where(box, shown[[1, 0, 3, 2]], shown)
        assert torch.equal(shown, label != 255)
    total = nn.functional.cross_entropy(logits, label.masked_fill(~kept, 255), ignore_index=255, reduction="sum")
    torch.testing.assert_close(found.detach(), total * shown.sum() / kept.sum() ** 2, rtol=1e-4, atol=1e-6)
    assert int(shown.sum()) < shown.numel()


@pytest.mark.parametrize("kind", ["unreliable", "reliable", "all"])
def test_the_ablation_takes_the_share_of_highest_or_of_lowest_entropy(build, kind, given):
    """Tables 4 and A2 of the paper: as many reliable as unreliable pixels, and not all below gamma_t."""
    method, on = cast("U2PL", build("u2pl", negative_pixels=kind, mix="none", alpha_0=0.3)), _padded()
    for index in range(4):
        train_step(method, index)
    method(on, step(4))
    _, teacher, _, label, _, negatives = given[-1]
    p = upsample(teacher.logits[4:], (SIZE, SIZE))
    entropy, known = -(p.softmax(1) * p.log_softmax(1)).sum(1), label != 255
    alpha = 0.3 * (1 - 4 / TOTAL)
    low, high = (torch.quantile(entropy[known], share) for share in (alpha, 1 - alpha))
    expected = {"unreliable": entropy >= high, "reliable": entropy <= low, "all": torch.ones_like(known)}[kind] & known
    size = (negatives.shape[1], negatives.shape[2])
    assert torch.equal(negatives, shrink(expected, size))
    share = {"unreliable": alpha, "reliable": alpha, "all": 1.0}[kind]
    assert float(expected.sum() / known.sum()) == pytest.approx(share, abs=0.01)


def test_cutmix_probability(build):
    method = cast("U2PL", build("u2pl", mix_share=0.5))
    labeled, unlabeled = _sides()
    looks = (method.targets(labeled, unlabeled, step(index)).images for index in range(60))
    used = [not torch.equal(images, unlabeled.image) for images in looks]
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
    at_stride_2 = 2 * (SIZE // 2) ** 2
    assert sum(logs["pseudo_labels"]) == pytest.approx(logs["kept"] * at_stride_2, rel=0.15)
    assert all(0 <= fill <= 1 for fill in logs["bank_fill"])


def test_nothing_random_depends_on_what_was_drawn_before(u2pl, build):
    torch.manual_seed(0)
    one = u2pl(batch(), step(5)).terms
    torch.rand(100)
    assert build("u2pl")(batch(), step(5)).terms == one


def test_two_classes_clamp_the_ranks_and_say_so(build, caplog):
    with caplog.at_level(logging.INFO, "pipeline"):
        method = cast("U2PL", build("u2pl", classes=2))
    assert "u2pl.r_l 3 leaves no negatives with 2 classes: using 1" in caplog.text
    assert method.options.r_l == 1
    for index in range(5):
        terms = train_step(method, index, batch(seed=index, classes=2))
        assert all(value.isfinite() for value in terms.values())
    assert method.bank.count.any()


def test_enough_classes_are_not_clamped(build, caplog):
    with caplog.at_level(logging.INFO, "pipeline"):
        assert cast("U2PL", build("u2pl", classes=4)).options.r_l == 3
    assert not caplog.text


def test_background_has_a_queue_of_its_own_size(u2pl):
    assert u2pl.bank.size.tolist() == [30] + [20] * (CLASSES - 1)


# ---- options ----------------------------------------------------------------------------------------------------

OPTIONS = {
    "upstream": {"variant": "upstream"},
    "upstream with its epochs and thresholds": {"variant": "upstream", "epoch_steps": 2, "thresholds": "worker"},
    "binary": {"loss": "binary"},
    "reliable negatives": {"negative_pixels": "reliable"},
    "all negatives": {"negative_pixels": "all"},
    "classmix": {"mix": "classmix", "mix_share": 1.0},
    "cutout": {"mix": "cutout", "mix_share": 1.0},
    "no mixing": {"mix": "none"},
    "one pass": {"teacher_passes": 1, "mix_share": 1.0},
    "one pass, cutout": {"teacher_passes": 1, "mix": "cutout", "mix_share": 1.0},
    "shared negatives": {"negative_groups": 2},
    "bfloat16 bank": {"bank_dtype": "bfloat16"},
    "smoothed prototypes": {"prototype_ema": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains(name, build):
    method = cast("U2PL", build("u2pl", **OPTIONS[name]))
    on = batch()
    losses = [train_step(method, index, on, lr=0.05) for index in range(8)]
    assert all(value.isfinite() for terms in losses for value in terms.values())
    assert losses[-1]["supervised"] < losses[0]["supervised"]
    assert losses[-1]["contrastive"] > 0
    assert method.bank.count.any()


@pytest.mark.parametrize("name", [*OPTIONS, None])
def test_plain_parts_train_as_the_fast_ones_do(name, build):
    """The same losses and networks after each step, with labels padded and unlabeled pixels left out.

    Each step begins with the same networks: what rounding makes of a few steps can move a pixel over a threshold, and
    which one depends on the processor.
    """
    options = OPTIONS[name] if name else {}
    fast, plain = (cast("U2PL", build("u2pl", **options, parts=parts)) for parts in ("fast", "reference"))
    close = 2e-2 if name == "bfloat16 bank" else 2e-4  # there the fast gradient is rounded as the keys are
    for index in range(5):
        plain.load_state_dict(fast.state_dict())
        one, other = (train_step(method, index, batch(), lr=0.05) for method in (fast, plain))
        assert {key: float(value) for key, value in one.items()} == pytest.approx(
            {key: float(value) for key, value in other.items()}, rel=close, abs=2e-5
        )
        theirs = dict(plain.named_parameters())
        for key, value in fast.named_parameters():
            torch.testing.assert_close(value, theirs[key], rtol=close, atol=close * 0.05, msg=f"step {index}: {key}")
        assert index < 4 or one["contrastive"] > 0


def _terms(build, index: int = 5, **options: Any) -> dict[str, torch.Tensor]:
    return build("u2pl", **options)(batch(), step(index)).terms


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "binary"},
        {"negative_pixels": "reliable"},
        {"negative_pixels": "all"},
        {"negative_groups": 2},
        {"variant": "upstream"},
        {"bank_dtype": "bfloat16"},
    ],
)
def test_options_of_the_contrast_change_it_alone(options, build):
    plain, changed = _terms(build), _terms(build, **options)
    assert plain["contrastive"] != changed["contrastive"]
    assert plain["unsupervised"] == changed["unsupervised"] or options.get("variant")  # that one labels padding, too


def test_a_bank_in_bfloat16_changes_the_loss_by_rounding_only(build):
    plain, rounded = (_terms(build, bank_dtype=dtype)["contrastive"] for dtype in ("float32", "bfloat16"))
    torch.testing.assert_close(plain, rounded, rtol=5e-3, atol=0)


def test_alpha_is_held_for_an_epoch(build):
    held, moving = (cast("U2PL", build("u2pl", epoch_steps=steps)) for steps in (4, 0))
    assert [held.alpha(step(index)) for index in (4, 5, 7)] == [moving.alpha(step(4))] * 3
    assert held.alpha(step(8)) == moving.alpha(step(8)) < held.alpha(step(7))


def test_upstream_ties_the_teacher_to_the_student_for_its_first_epoch(build):
    """By value: the release shares the storage."""
    method = cast("U2PL", build("u2pl", variant="upstream", epoch_steps=3))
    for index in range(WARM + 3):
        train_step(method, index)
        assert not _differ(method)
    train_step(method, WARM + 3)
    assert _differ(method)


def test_upstream_learns_padding_as_class_0(build):
    method = cast("U2PL", build("u2pl", variant="upstream"))
    labeled, unlabeled = _sides()
    padded = dataclasses.replace(labeled, valid=torch.zeros_like(labeled.valid))
    supervised = method(Batch(padded, unlabeled), step(0)).terms["supervised"]
    assert labeled.mask is not None
    zero = dataclasses.replace(labeled, mask=torch.zeros_like(labeled.mask))
    assert supervised == method(Batch(zero, unlabeled), step(0)).terms["supervised"]


def test_upstream_divides_the_weight_by_the_ranks(build):
    method = cast("U2PL", build("u2pl", variant="upstream", lambda_c=1.0))
    assert [method.contrast_weight(World(0, size)) for size in (1, 4)] == [1.0, 0.25]
    assert cast("U2PL", build("u2pl")).contrast_weight(World(0, 4)) == 0.1


def test_cutout_erases_image_and_label(build):
    method = cast("U2PL", build("u2pl", mix="cutout", mix_share=1.0))
    labeled, unlabeled = _sides(seed=9)
    taught = method.targets(labeled, unlabeled, step(4))
    box = cutmix_masks(step(4).uniform_per_image("cutmix", (2, 3), torch.device("cpu")), (SIZE, SIZE))
    assert (taught.label[box] == 255).all()
    assert torch.equal(taught.label[~box] == 255, ~unlabeled.valid[~box])
    grey = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)
    assert torch.equal(taught.images, torch.where(box[:, None], grey, unlabeled.image))


def test_smoothed_prototypes_are_state_and_move_slowly(build):
    method = cast("U2PL", build("u2pl", prototype_ema=True))
    assert "prototypes" in method.state_dict()
    for index in range(WARM + 1):
        train_step(method, index)
    first = method.prototypes.clone()
    assert first.any()
    train_step(method, WARM + 1)
    assert not torch.equal(first, method.prototypes)


@pytest.mark.parametrize("groups", [-1, 3])
def test_groups_of_negatives_must_divide_the_anchors(groups, build):
    with pytest.raises(UserError, match="negative_groups"):
        build("u2pl", negative_groups=groups)


@pytest.mark.parametrize("kind", ["inf", "nan"])
def test_an_overflow_in_one_pixel_of_the_teacher_spoils_nothing(kind, build):
    """Under autocast a score may overflow: the pixel is no label, no anchor, no key."""
    method = cast("U2PL", build("u2pl", mix="none"))
    for index in range(4):
        train_step(method, index)
    handle = method.teacher.register_forward_hook(_Overflow(float(kind)))
    terms = train_step(method, 4)
    handle.remove()
    assert all(value.isfinite() for value in terms.values())
    assert all(value.isfinite().all() for value in method.state_dict().values())


class _Overflow:
    """Puts a value into one pixel of an unlabeled image, in scores and features."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor], output: Prediction) -> Prediction:
        del module, inputs
        logits, features = output.logits.clone(), output.features.clone() if output.features is not None else None
        logits[-1, 1, 3, 3] = self.value
        if features is not None:
            features[-1, :, 3, 3] = self.value
        return Prediction(logits, features, None)


def test_many_workers_give_fewer_keys_each():
    options = U2PLOptions()
    assert [options.keys_of(workers) for workers in (1, 4, 8, 16, 64, 512, 4096)] == [256, 256, 256, 128, 32, 4, 1]
