from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from pipeline.ops.entropy import IGNORE
from pipeline.ops.losses import (
    Normaliser,
    confident_labels,
    confident_share,
    masked_cross_entropy,
    probability_mse,
    soft_cross_entropy,
    squared_error,
    weighted_cross_entropy,
)
from pipeline.ops.world import World
from tests.unit.ops.worlds import on_ranks

NORMALISERS: tuple[Normaliser, ...] = ("kept", "valid", "all")
ALONE = World()


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets and validity of four images with unequal shares of each kind of pixel."""
    torch.manual_seed(0)
    target = torch.randint(0, 3, (4, 6, 7))
    valid = torch.rand(4, 6, 7) < torch.tensor([0.9, 0.3, 1.0, 0.0]).view(4, 1, 1)
    kept = valid & (torch.rand(4, 6, 7) < torch.tensor([0.2, 0.9, 0.5, 0.9]).view(4, 1, 1))
    return torch.randn(4, 3, 6, 7), target.masked_fill(~kept, IGNORE), valid


def _slow(logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, over: str) -> torch.Tensor:
    total = torch.zeros(())
    for b, y, x in (target != IGNORE).nonzero().tolist():
        total = total - logits[b, :, y, x].log_softmax(0)[target[b, y, x]]
    return total / {"kept": (target != IGNORE).sum(), "valid": valid.sum(), "all": valid.numel()}[over]


@pytest.mark.parametrize("over", NORMALISERS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cross_entropy_is_the_mean_over_the_global_batch(over, ranks):
    """Value and gradient, as DDP averages them, however the pixels lie."""
    logits, target, valid = _batch()
    reference = logits.clone().requires_grad_()
    expected = _slow(reference, target, valid, over)
    expected.backward()
    inputs = [part.clone().requires_grad_() for part in logits.chunk(ranks)]

    def share(world: World) -> torch.Tensor:
        rank = world.rank
        return masked_cross_entropy(inputs[rank], target.chunk(ranks)[rank], valid.chunk(ranks)[rank], world, over)

    total = torch.stack(on_ranks(ranks, share)).mean()
    total.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.cat([part.grad for part in inputs if part.grad is not None]), reference.grad)


@pytest.mark.parametrize("over", NORMALISERS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_squared_error_is_the_mean_over_the_global_batch(over, ranks):
    logits, _, valid = _batch()
    target = torch.randn_like(logits).softmax(1)
    expected = torch.zeros(())
    for b, y, x in valid.nonzero().tolist():
        expected += (logits[b, :, y, x].softmax(0) - target[b, :, y, x]).square().sum()
    expected /= valid.numel() if over == "all" else valid.sum()

    def share(world: World) -> torch.Tensor:
        one, two, shown = (part.chunk(ranks)[world.rank] for part in (logits, target, valid))
        return probability_mse(one, two, shown, world, over)

    torch.testing.assert_close(torch.stack(on_ranks(ranks, share)).mean(), expected)


def test_squared_error_over_channels_is_torchs_mse():
    one, two = torch.randn(2, 2, 3, 4, 5)
    found = squared_error(one, two, torch.ones(2, 4, 5, dtype=torch.bool), ALONE, "valid") / 3
    torch.testing.assert_close(found, F.mse_loss(one, two))


@pytest.mark.parametrize("over", NORMALISERS)
def test_nothing_kept_is_loss_0_with_a_graph(over):
    logits, nothing = torch.randn(2, 3, 4, 5, requires_grad=True), torch.zeros(2, 4, 5, dtype=torch.bool)
    target = torch.full((2, 4, 5), IGNORE)
    one = masked_cross_entropy(logits, target, nothing, ALONE, over)
    two = probability_mse(logits, torch.rand(2, 3, 4, 5), nothing, ALONE, over)
    assert one == two == 0
    (one + two).backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_confident_share_counts_the_valid_pixels_of_all_ranks(ranks):
    _, _, valid = _batch()
    confidence = torch.rand(4, 6, 7)
    expected = float((valid & (confidence >= 0.6)).sum() / valid.sum())
    shares = on_ranks(
        ranks,
        lambda world: confident_share(confidence.chunk(ranks)[world.rank], valid.chunk(ranks)[world.rank], 0.6, world),
    )
    assert [float(share) for share in shares] == pytest.approx([expected] * ranks)
    assert confident_share(confidence, torch.zeros_like(valid), 0.6, ALONE) == 0


def test_confident_labels_against_the_words():
    logits, _, valid = _batch()
    logits.requires_grad_()
    labels = confident_labels(logits * 2, valid, 0.7)
    assert not labels.requires_grad
    for b, y, x in torch.ones_like(valid).nonzero().tolist():
        probability = (logits[b, :, y, x] * 2).softmax(0).detach()
        sure = bool(valid[b, y, x]) and float(probability.max()) >= 0.7
        assert labels[b, y, x] == (probability.argmax() if sure else IGNORE)
    assert torch.equal(confident_labels(logits, valid, 0.0) != IGNORE, valid)


def _soft(logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, world: World) -> torch.Tensor:
    return soft_cross_entropy(logits, target, valid, world)


def _weighted(logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, world: World) -> torch.Tensor:
    return weighted_cross_entropy(logits, target.argmax(1), valid * target.amax(1), world)


def _slow_mean(loss: Callable[..., torch.Tensor], logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor):
    """Pixel by pixel: sum of weights x losses / sum of weights."""
    values, weights = [], []
    for b, y, x in valid.nonzero().tolist():
        p, q = logits[b, :, y, x].softmax(0), target[b, :, y, x]
        weights.append(q.max() if loss is _weighted else torch.ones(()))
        values.append(-p[q.argmax()].log() * q.max() if loss is _weighted else -(q * p.log()).sum())
    return torch.stack(values).sum() / torch.stack(weights).sum()


@pytest.mark.parametrize("loss", [_soft, _weighted])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_weighted_means_are_those_of_the_global_batch(loss, ranks):
    logits, _, valid = _batch()
    target = torch.randn_like(logits).softmax(1)
    reference = logits.clone().requires_grad_()
    expected = _slow_mean(loss, reference, target, valid)
    expected.backward()
    inputs = [part.clone().requires_grad_() for part in logits.chunk(ranks)]
    chunks = list(zip(inputs, target.chunk(ranks), valid.chunk(ranks), strict=True))
    total = torch.stack(on_ranks(ranks, lambda world: loss(*chunks[world.rank], world))).mean()
    total.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.cat([part.grad for part in inputs if part.grad is not None]), reference.grad)


@pytest.mark.parametrize("loss", [_soft, _weighted])
def test_weighted_means_of_nothing_are_0_with_a_graph(loss):
    logits, _, valid = _batch()
    logits.requires_grad_()
    value = loss(logits, torch.randn_like(logits).softmax(1).detach(), torch.zeros_like(valid), ALONE)
    value.backward()
    assert value == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_ignored_labels_add_nothing_to_a_weighted_mean():
    logits = torch.randn(1, 3, 2, 2)
    target = torch.tensor([[[0, 255], [2, 255]]])
    weight = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    losses = F.cross_entropy(logits, target, ignore_index=255, reduction="none")
    expected = (losses[0, 0, 0] + 3 * losses[0, 1, 0]) / 4
    torch.testing.assert_close(weighted_cross_entropy(logits, target, weight, ALONE), expected)
