import pytest
import torch
import torch.nn.functional as F

from pipeline.ops.losses import IGNORE, cross_entropy, ohem_cross_entropy, unsupervised_cross_entropy
from pipeline.ops.world import World
from tests.unit.ops.worlds import on_ranks


def _batch(ignored: tuple[float, ...] = (0.1, 0.9, 0.5, 1.0)) -> tuple[torch.Tensor, torch.Tensor]:
    """Four images with unequal shares of ignored pixels."""
    torch.manual_seed(0)
    target = torch.randint(0, 3, (4, 6, 7))
    target[torch.rand(4, 6, 7) < torch.tensor(ignored).view(4, 1, 1)] = IGNORE
    return torch.randn(4, 3, 6, 7), target


@pytest.mark.parametrize("loss", [cross_entropy, unsupervised_cross_entropy])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_mean_of_the_shares_is_the_loss_of_the_global_batch(loss, ranks):
    """Value and gradient, as DDP averages them, however the ignored pixels lie."""
    logits, target = _batch()
    reference = logits.clone().requires_grad_()
    expected = F.cross_entropy(reference, target, ignore_index=IGNORE)
    if loss is unsupervised_cross_entropy:
        expected = expected * target.numel() / (target != IGNORE).sum()
    expected.backward()

    inputs = [part.clone().requires_grad_() for part in logits.chunk(ranks)]
    shares = on_ranks(ranks, lambda w: loss(inputs[w.rank], target.chunk(ranks)[w.rank], w))
    total = torch.stack(shares).mean()
    total.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.cat([part.grad for part in inputs if part.grad is not None]), reference.grad)


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy, unsupervised_cross_entropy])
def test_nothing_known_is_loss_0_with_a_graph(loss):
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    value = loss(logits, torch.full((2, 4, 5), IGNORE), World())
    value.backward()
    assert value == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def _ohem(logits: torch.Tensor, target: torch.Tensor, threshold: float, min_kept: int) -> torch.Tensor:
    """Pixel by pixel, as the reference words it."""
    probability, losses = [], []
    for b, y, x in (target != IGNORE).nonzero().tolist():
        probability.append(float(logits[b, :, y, x].softmax(0)[target[b, y, x]]))
        losses.append(F.cross_entropy(logits[b, :, y, x], target[b, y, x]))
    if len(losses) >= min_kept:
        limit = max(threshold, sorted(probability)[min_kept - 1])
        losses = [loss for loss, p in zip(losses, probability, strict=True) if p <= limit + 1e-7]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("min_kept", [1, 20, 70, 10_000])
@pytest.mark.parametrize("threshold", [0.2, 0.7])
def test_ohem_against_the_words_of_the_reference(threshold, min_kept):
    logits, target = _batch((0.1, 0.2, 0.3, 0.4))
    found = ohem_cross_entropy(logits * 2, target, World(), threshold, min_kept)
    torch.testing.assert_close(found, _ohem(logits * 2, target, threshold, min_kept))
