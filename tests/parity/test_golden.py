"""The ops against numbers computed with the upstream code (see the README beside the vectors)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.inference.metrics import ConfusionMatrix
from pipeline.ops import mixing
from pipeline.ops.bank import MemoryBank
from pipeline.ops.contrast import Draws, Pixels, Sets, candidate_sets, contrastive_loss, info_nce, prototypes
from pipeline.ops.entropy import entropy, partition, shrink
from pipeline.ops.losses import unsupervised_cross_entropy
from pipeline.ops.quantile import masked_quantile
from pipeline.ops.schedules import ema_decay, poly, unreliable_share
from pipeline.ops.selection import Members, rows
from pipeline.ops.world import World

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
ALONE = World()
CONTRAST = ("correct_onehot", "all_classes")

pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="needs the golden vectors")


def _golden(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


def _number(value: Any) -> float:
    return float(torch.as_tensor(value).detach())


# ---- entropy, thresholds, unsupervised loss -------------------------------------------------------------------


@pytest.mark.parametrize("case", range(5))
def test_unsupervised_loss(case: int):
    golden = _golden("unsup_loss")
    label = golden["label_u"]
    alpha = (1 - golden["percents"][case] / 100).float()
    parts = partition(entropy(golden["pred_teacher"]), label, alpha, ALONE)
    assert _number(parts.threshold) == pytest.approx(_number(golden["thresholds"][case]), abs=1e-6)
    kept = label.masked_fill(~parts.reliable, 255)
    assert torch.equal(kept, golden["targets_after"][case])

    logits = golden["pred_student"].clone().requires_grad_()
    loss = unsupervised_cross_entropy(logits, kept, ALONE)
    loss.backward()
    assert _number(loss) == pytest.approx(_number(golden["losses"][case]), rel=1e-6)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, golden["grads"][case], rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", range(5))
def test_entropy_masks(case: int):
    golden = _golden("entropy_masks")
    label, small = golden["label_u"], (9, 9)
    values = entropy(golden["pred_teacher"])
    torch.testing.assert_close(values, golden["entropy"], rtol=0, atol=1e-6)

    share = unreliable_share(int(golden["epoch"][case]), int(golden["epochs"]), 0.2)
    assert 100 * share == pytest.approx(_number(golden["alpha_percent"][case]))
    assert 100 * (1 - share) == pytest.approx(_number(golden["drop_percent"][case]))
    parts = partition(values, label, torch.tensor(share), ALONE)
    assert _number(parts.threshold) == pytest.approx(_number(golden["high_thresh"][case]), abs=1e-6)
    assert torch.equal(parts.unreliable, golden["high_mask_full"][case] > 0)
    assert torch.equal(parts.reliable, (label != 255) & ~parts.unreliable)  # the paper's, not low_mask (row 10)

    low = masked_quantile(values, label != 255, torch.tensor([share]), ALONE)[0]
    assert _number(low) == pytest.approx(_number(golden["low_thresh"][case]), abs=1e-6)
    low_mask = (label != 255) & (values <= low)
    assert torch.equal(low_mask, golden["low_mask_full"][case] > 0)
    known = golden["label_l"] != 255
    for mask, name in ((low_mask, "low"), (parts.unreliable, "high")):
        reduced = shrink(torch.cat([known, mask]), small)
        assert torch.equal(reduced, golden[f"{name}_mask_all_small"][case][:, 0] > 0)


# ---- contrastive loss -----------------------------------------------------------------------------------------


def _pixels(golden: dict[str, Tensor]) -> Pixels:
    label = shrink(torch.cat([golden["label_l"], golden["label_u"]]), (9, 9))
    return Pixels(
        student=golden["rep"].clone().requires_grad_(),
        teacher=golden["rep_teacher"],
        probability=golden["prob_teacher"],
        label=label,
        reliable=golden["low_mask"][:, 0] > 0,
        unreliable=golden["high_mask"][:, 0] > 0,
        labeled=torch.tensor([True, True, False, False]),
    )


def _bank(golden: dict[str, Tensor]) -> MemoryBank:
    bank = MemoryBank(golden["bank_sizes"].tolist(), 8)
    bank.push(golden["bank_init"], torch.ones(7, 6, dtype=torch.bool), ALONE)
    return bank


def _uniform(position: Tensor, pool: Tensor) -> Tensor:
    """Numbers in [0,1) that make `floor(u * pool)` give `position`."""
    return (position.double() + 0.5).div(pool.view(-1, *[1] * (position.dim() - 1))).float()


def _check_bank(bank: MemoryBank, golden: dict[str, Tensor]) -> None:
    assert torch.equal(bank.count, golden["bank_count_after"])
    for label, content in enumerate(golden["bank_after"]):
        content = content[~content.isnan().any(1)]
        torch.testing.assert_close(bank.ordered(label), F.normalize(content, dim=-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONTRAST)
def test_candidate_sets(name: str):
    golden = _golden(f"contrast_{name}")
    delta_p, _, r_l, r_h, *_ = golden["cfg"].tolist()
    sets = candidate_sets(_pixels(golden), delta_p, int(r_l), int(r_h))
    shape = golden["anchor_mask"].shape
    assert torch.equal(sets.anchor.view(shape), golden["anchor_mask"])
    assert torch.equal(sets.positive.view(shape), golden["proto_mask"])
    if name == "correct_onehot":
        assert torch.equal(sets.negative.view(shape), golden["paper_negative_mask"])


@pytest.mark.parametrize("name", CONTRAST)
def test_bank_and_loss_with_the_recorded_draws(name: str):
    golden = _golden(f"contrast_{name}")
    delta_p, _, r_l, r_h, anchors, negatives, tau = golden["cfg"].tolist()
    pixels, bank = _pixels(golden), _bank(golden)
    sets = candidate_sets(pixels, delta_p, int(r_l), int(r_h))

    members = Members(golden["negative_mask"].flatten(1))
    assert torch.equal(members.count, golden["new_keys"])
    index, valid = members.stratified(torch.zeros(7, golden["negative_mask"][0].numel()))
    bank.push(rows(pixels.teacher, index), valid, ALONE)
    _check_bank(bank, golden)

    candidates = Members(sets.anchor)
    assert torch.equal(candidates.count, golden["draw_anchor_pool"])
    assert torch.equal(bank.count, golden["draw_negative_pool"])
    chosen = bank.row(golden["draw_negative_idx"].view(7, int(anchors), int(negatives)))
    anchor = rows(pixels.student, candidates.lookup(golden["draw_anchor_idx"]))
    loss = info_nce(anchor, prototypes(pixels.teacher, sets.positive), bank.keys, chosen, tau).sum() / 7
    loss.backward()
    _check_loss(loss, pixels, golden)


@pytest.mark.parametrize("name", CONTRAST)
def test_the_whole_contrastive_loss(name: str):
    """The same through the function that the method calls, with uniform numbers that lead to the recorded draws."""
    golden = _golden(f"contrast_{name}")
    delta_p, _, r_l, r_h, anchors, negatives, tau = golden["cfg"].tolist()
    pixels, bank = _pixels(golden), _bank(golden)
    own = candidate_sets(pixels, delta_p, int(r_l), int(r_h))
    sets = Sets(
        own.anchor, own.positive, golden["negative_mask"].flatten(1)
    )  # the file's loss has upstream's negatives
    draws = Draws(
        anchors=_uniform(golden["draw_anchor_idx"], golden["draw_anchor_pool"]),
        keys=torch.zeros(7, sets.negative.shape[1]),
        negatives=_uniform(
            golden["draw_negative_idx"].view(7, int(anchors), int(negatives)), golden["draw_negative_pool"]
        ),
    )
    loss, count = contrastive_loss(pixels, sets, bank, draws, tau, ALONE)
    loss.backward()
    assert torch.equal(count, golden["draw_anchor_pool"])
    _check_bank(bank, golden)
    _check_loss(loss, pixels, golden)


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
        torch.testing.assert_close(bank.ordered(0), F.normalize(golden[f"after{step}"], dim=-1), rtol=0, atol=1e-6)


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
