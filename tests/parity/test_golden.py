"""The ops against numbers computed with the upstream code (see tests/data/README.md)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.inference.evaluate import ConfusionMatrix
from pipeline.methods.u2pl import fast, reference, upstream
from pipeline.methods.u2pl.bank import MemoryBank
from pipeline.methods.u2pl.fast import reliable_labels
from pipeline.methods.u2pl.reference import Draws, Pixels, Positives, Reliability, Rule, averaged
from pipeline.methods.u2pl.u2pl import Augmentation
from pipeline.ops import mixing
from pipeline.ops.entropy import masked_quantile
from pipeline.ops.grid import FullGrid, QuarterGrid, shrink
from pipeline.ops.losses import unsupervised_cross_entropy
from pipeline.ops.schedules import ema_decay, poly, unreliable_share
from pipeline.ops.selection import Members, rows
from pipeline.ops.world import World
from tests.unit.methods.u2pl.banks import ordered

GOLDEN = Path(__file__).parents[1] / "data/golden"
ALONE = World()
CONTRAST = ("upstream_onehot", "correct_onehot", "all_classes")


def _golden(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


def _number(value: Any) -> float:
    return float(torch.as_tensor(value).detach())


# ---- entropy, thresholds, unsupervised loss -------------------------------------------------------------------


PARTS = pytest.mark.parametrize("parts", [fast, reference], ids=["fast", "reference"])


def _split(parts: Any, student: Tensor, teacher: Tensor, label: Tensor, alpha: Tensor) -> Reliability:
    shown, shares = torch.ones_like(label, dtype=torch.bool), torch.stack([1 - alpha, alpha])
    split: Reliability = parts.unsupervised(student, teacher, label, shown, shares, ALONE, ALONE)
    return split


@PARTS
@pytest.mark.parametrize("case", range(5))
def test_unsupervised_loss(case: int, parts: Any):
    golden = _golden("unsup_loss")
    logits, alpha = golden["pred_student"].clone().requires_grad_(), (1 - golden["percents"][case] / 100).float()
    split = _split(parts, logits, golden["pred_teacher"], golden["label_u"], alpha)
    assert _number(split.thresholds[0]) == pytest.approx(_number(golden["thresholds"][case]), abs=1e-6)
    assert torch.equal(split.label, golden["targets_after"][case])
    loss = split.loss
    loss.backward()
    assert _number(loss) == pytest.approx(_number(golden["losses"][case]), rel=1e-6)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, golden["grads"][case], rtol=0, atol=1e-7)


@PARTS
@pytest.mark.parametrize("case", range(5))
def test_entropy_masks(case: int, parts: Any):
    golden, grid = _golden("entropy_masks"), FullGrid((33, 33), (9, 9))

    share = unreliable_share(int(golden["epoch"][case]), int(golden["epochs"]), 0.2)
    assert 100 * share == pytest.approx(_number(golden["alpha_percent"][case]))
    assert 100 * (1 - share) == pytest.approx(_number(golden["drop_percent"][case]))
    split = _split(parts, golden["pred_teacher"], golden["pred_teacher"], golden["label_u"], torch.tensor(share))
    torch.testing.assert_close(split.entropy, golden["entropy"], rtol=0, atol=1e-6)
    assert _number(split.thresholds[0]) == pytest.approx(_number(golden["high_thresh"][case]), abs=1e-6)
    assert torch.equal(split.unreliable, golden["high_mask_full"][case] > 0)
    assert torch.equal(split.known, golden["label_u"] != 255)
    assert torch.equal(split.reliable, split.known & ~split.unreliable)  # the paper's, not low_mask
    assert _number(split.thresholds[1]) == pytest.approx(_number(golden["low_thresh"][case]), abs=1e-6)
    assert torch.equal(split.surest, golden["low_mask_full"][case] > 0)
    truth = shrink(golden["label_l"] != 255, (9, 9))
    for mask, name in ((split.surest, "low"), (split.unreliable, "high")):
        reduced = torch.cat([truth, grid.shrink(mask)])
        assert torch.equal(reduced, golden[f"{name}_mask_all_small"][case][:, 0] > 0)


@pytest.mark.parametrize("case", range(5))
def test_the_quarter_grid_gives_the_same(case: int):
    """The golden logits of the middle 9x9 pixels, four times finer: both grids agree within the golden tolerances."""
    golden = _golden("unsup_loss")
    student, teacher = (golden[f"pred_{name}"][..., 12:21, 12:21].contiguous() for name in ("student", "teacher"))
    label = golden["label_u"]
    alpha = (1 - golden["percents"][case] / 100).float()
    found = []
    for grid in (FullGrid((33, 33), (9, 9)), QuarterGrid((33, 33), (9, 9))):
        target = grid.arrange(label)
        values = grid.entropy(teacher)
        gamma = masked_quantile(values, target != 255, (1 - alpha).view(1), ALONE)[0]
        kept = reliable_labels(values, target, gamma)
        logits = student.clone().requires_grad_()
        loss = unsupervised_cross_entropy(logits, kept, torch.ones_like(label, dtype=torch.bool), ALONE, grid)
        loss.backward()
        found.append((loss.detach(), logits.grad, gamma, grid.shrink(values) < gamma))
    (loss, gradient, gamma, reliable), (other, other_gradient, other_gamma, other_reliable) = found
    assert _number(other) == pytest.approx(_number(loss), rel=1e-6)
    torch.testing.assert_close(other_gradient, gradient, rtol=0, atol=1e-6)
    assert _number(other_gamma) == pytest.approx(_number(gamma), abs=2e-6)
    assert torch.equal(other_reliable, reliable)


# ---- contrastive loss -----------------------------------------------------------------------------------------


def _pixels(golden: dict[str, Tensor]) -> Pixels:
    return Pixels(
        student=golden["rep"].clone().requires_grad_(),
        teacher=golden["rep_teacher"],
        logits=golden["prob_teacher"].log(),
        label=shrink(torch.cat([golden["label_l"], golden["label_u"]]), (9, 9)),
        may_be_anchor=golden["low_mask"][:, 0] > 0,
        may_be_negative=golden["high_mask"][:, 0] > 0,
        labeled=2,
    )


def _rule(golden: dict[str, Tensor]) -> Rule:
    delta_p, _, r_l, r_h, *_ = golden["cfg"].tolist()
    return Rule(delta_p, int(r_l), int(r_h))


def _own(name: str, pixels: Pixels) -> Tensor:
    """Labels as the file has them: the release's one-hot or the right one."""
    if name == "upstream_onehot":
        return torch.cat([upstream.one_hot(half, 7) for half in (pixels.label[:2], pixels.label[2:])])
    return pixels.label.unsqueeze(1) == torch.arange(7).view(-1, 1, 1)


def _bank(golden: dict[str, Tensor]) -> MemoryBank:
    bank = MemoryBank(golden["bank_sizes"].tolist(), 8)
    bank.push(golden["bank_init"], torch.ones(7, 6, dtype=torch.bool), ALONE)
    return bank


def _uniform(position: Tensor, pool: Tensor) -> Tensor:
    """Numbers in [0,1) that make `floor(u * pool)` give `position`."""
    return (position.double() + 0.5).div(pool.view(-1, *[1] * (position.dim() - 1))).float()


def _draws(golden: dict[str, Tensor]) -> Draws:
    """Uniform numbers that lead to the recorded draws."""
    anchors, negatives = (int(number) for number in golden["cfg"][4:6])
    return Draws(
        anchors=_uniform(golden["draw_anchor_idx"], golden["draw_anchor_pool"]),
        keys=torch.zeros(7, golden["negative_mask"][0].numel()),
        negatives=_uniform(golden["draw_negative_idx"].view(7, anchors, negatives), golden["draw_negative_pool"]),
    )


def _check_bank(bank: MemoryBank, golden: dict[str, Tensor]) -> None:
    assert torch.equal(bank.count, golden["bank_count_after"])
    for label, content in enumerate(golden["bank_after"]):
        content = content[~content.isnan().any(1)]
        torch.testing.assert_close(ordered(bank, label), F.normalize(content, dim=-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONTRAST)
def test_upstream_candidate_sets(name: str):
    golden = _golden(f"contrast_{name}")
    pixels = _pixels(golden)
    own = _own(name, pixels)
    assert torch.equal(own, torch.cat([golden["onehot_l_small"], golden["onehot_u_small"]]) > 0)
    sets = upstream.masks(pixels, own, _rule(golden))
    for found, expected in zip(sets, ("anchor_mask", "proto_mask", "negative_mask"), strict=True):
        assert torch.equal(found, golden[expected].flatten(1)), expected


@PARTS
def test_paper_candidate_sets(parts: Any):
    golden = _golden("contrast_correct_onehot")
    pixels, draws = _pixels(golden), _draws(golden)
    expected = golden["paper_negative_mask"].flatten(1)
    found = parts.candidates(pixels, _rule(golden), draws)
    assert torch.equal(found.negative_count, expected.sum(1))
    assert torch.equal(found.anchor_count, golden["draw_anchor_pool"])
    features = rows(pixels.teacher)
    for label in range(7):
        anchors = golden["anchor_mask"][label].flatten().nonzero().flatten()
        assert torch.equal(found.anchors[label], anchors[golden["draw_anchor_idx"][label]])
        member = golden["proto_mask"][label].flatten()
        assert found.positive_count[label] == member.sum()
        torch.testing.assert_close(found.positive_sum[label], features[member].sum(0))
        keys = found.keys[label][found.keys_valid[label]]
        assert torch.equal(keys, expected[label].nonzero().flatten())


@PARTS
@pytest.mark.parametrize("name", CONTRAST)
def test_the_whole_upstream_loss(name: str, parts: Any):
    golden = _golden(f"contrast_{name}")
    pixels, bank, draws = _pixels(golden), _bank(golden), _draws(golden)
    found = upstream.candidates(pixels, _own(name, pixels), _rule(golden), draws)
    assert torch.equal(found.negative_count, golden["new_keys"])
    found, positive = upstream.mispaired(found, upstream.positives(found))
    loss = parts.contrastive(pixels, found, positive, bank, draws, _number(golden["cfg"][6]), ALONE)
    loss.backward()
    assert torch.equal(found.anchor_count, golden["draw_anchor_pool"])
    assert torch.equal(bank.count, golden["draw_negative_pool"])
    _check_bank(bank, golden)
    _check_loss(loss, pixels, golden)


@PARTS
@pytest.mark.parametrize("name", ["correct_onehot", "all_classes"])
def test_the_whole_loss_with_the_recorded_keys(name: str, parts: Any):
    """The method's own path; the file's keys follow the release's rule, everything else the paper's."""
    golden = _golden(f"contrast_{name}")
    pixels, bank, draws = _pixels(golden), _bank(golden), _draws(golden)
    keys, valid = Members(golden["negative_mask"].flatten(1)).stratified(draws.keys)
    found = parts.candidates(pixels, _rule(golden), draws)._replace(keys=keys, keys_valid=valid)
    positive = parts.positives(found, ALONE)
    loss = parts.contrastive(pixels, found, positive, bank, draws, _number(golden["cfg"][6]), ALONE)
    loss.backward()
    _check_bank(bank, golden)
    _check_loss(loss, pixels, golden)


def test_prototype_average():
    golden = _golden("prototype_ema")
    own = (golden["onehot"].unsqueeze(1) == torch.arange(7).view(-1, 1, 1)).transpose(0, 1).flatten(1)
    smoothed = torch.zeros(7, 8)
    for index, features in enumerate(golden["rep_teacher_steps"]):
        mean = own.float() @ rows(features) / own.sum(1, keepdim=True)
        decay = ema_decay(index, 0, 0.999)
        assert decay == pytest.approx(_number(golden["decay"][index]))
        current = Positives(mean, own.sum(1).float(), torch.ones(7))
        smoothed = averaged(smoothed, current, torch.tensor(decay))
        torch.testing.assert_close(smoothed, golden["prototypes"][index], rtol=1e-6, atol=1e-6)


def _check_loss(loss: Tensor, pixels: Pixels, golden: dict[str, Tensor]) -> None:
    assert _number(loss) == pytest.approx(_number(golden["loss"]), rel=1e-6)
    assert pixels.student.grad is not None
    torch.testing.assert_close(pixels.student.grad, golden["grad_rep"], rtol=0, atol=1e-7)


def test_queue():
    golden = _golden("queue")
    bank = MemoryBank([int(golden["size"])], 3)
    for step in range(1, 5):
        keys = golden[f"push{step}"]
        bank.push(keys[None], torch.ones(1, len(keys), dtype=torch.bool), ALONE)
        torch.testing.assert_close(ordered(bank, 0), F.normalize(golden[f"after{step}"], dim=-1), rtol=0, atol=1e-6)


# ---- schedules, score, mixing ---------------------------------------------------------------------------------


def test_schedules():
    golden = _golden("schedules")
    base, total, power = (_number(golden[f"poly_{name}"]) for name in ("base", "total", "power"))
    rates = [base * poly(step, int(total), power) for step in range(100)]
    assert rates == pytest.approx(golden["poly_lr"].tolist(), rel=1e-6)
    for warm_epochs in (0, 1):
        start = warm_epochs * int(golden["steps_per_epoch"])
        steps = golden[f"ema_iters_sup{warm_epochs}"].tolist()
        decays = [ema_decay(step, start, 0.99) for step in steps]
        assert decays == pytest.approx(golden[f"ema_decay_sup{warm_epochs}"].tolist(), abs=1e-7)


def test_miou():
    golden = _golden("miou")
    matrix = ConfusionMatrix(int(golden["num_classes"]))
    matrix.update(golden["pred"], golden["target"])
    assert torch.equal(matrix.intersection, golden["intersection"])
    assert torch.equal(matrix.union, golden["union"])
    scores = matrix.scores(absent="zero")
    assert scores.iou == pytest.approx(golden["iou"].tolist(), rel=1e-6)
    assert scores.miou == pytest.approx(_number(golden["miou"]), rel=1e-6)


def test_cutmix():
    golden = _golden("cutmix")
    replaced = golden["masks_cutmix"] == 0
    partner = mixing.partners(3, torch.device("cpu"))  # three images: upstream's (i + 1) mod 3
    for name in ("image", "target", "logits"):
        assert torch.equal(mixing.mix(golden[name], replaced, partner), golden[f"cutmix_{name}"])


def test_cutout():
    golden = _golden("cutmix")
    erased = golden["masks_cutout"] == 0
    change = Augmentation(erased, None)
    for name, blank in (("image", 0), ("target", 255), ("logits", 0)):
        assert torch.equal(change.apply(golden[name], blank), golden[f"cutout_{name}"])
