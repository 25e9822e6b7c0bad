import pytest
import torch
import torch.nn.functional as F

from pipeline.ops.grid import FullGrid, Grid, QuarterGrid, upsample
from pipeline.ops.losses import (
    IGNORE,
    cross_entropy,
    dice_loss,
    focal_cross_entropy,
    mean_count,
    ohem_cross_entropy,
    unsupervised_cross_entropy,
)
from pipeline.ops.world import World
from tests.unit.ops.worlds import on_ranks


def unsupervised(logits: torch.Tensor, target: torch.Tensor, world: World, grid: Grid | None = None) -> torch.Tensor:
    """L_u of images without padding."""
    size = grid.size if grid else (target.shape[1], target.shape[2])
    return unsupervised_cross_entropy(logits, target, torch.ones(len(logits), *size, dtype=torch.bool), world, grid)


def _batch(ignored: tuple[float, ...] = (0.1, 0.9, 0.5, 1.0)) -> tuple[torch.Tensor, torch.Tensor]:
    """Four images with unequal shares of ignored pixels."""
    torch.manual_seed(0)
    target = torch.randint(0, 3, (4, 6, 7))
    target[torch.rand(4, 6, 7) < torch.tensor(ignored).view(4, 1, 1)] = IGNORE
    return torch.randn(4, 3, 6, 7), target


@pytest.mark.parametrize("loss", [cross_entropy, unsupervised])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_mean_of_the_shares_is_the_loss_of_the_global_batch(loss, ranks):
    """Value and gradient, as DDP averages them, however the ignored pixels lie."""
    logits, target = _batch()
    reference = logits.clone().requires_grad_()
    expected = F.cross_entropy(reference, target, ignore_index=IGNORE)
    if loss is unsupervised:
        expected = expected * target.numel() / (target != IGNORE).sum()
    expected.backward()

    inputs = [part.clone().requires_grad_() for part in logits.chunk(ranks)]
    shares = on_ranks(ranks, lambda w: loss(inputs[w.rank], target.chunk(ranks)[w.rank], w))
    total = torch.stack(shares).mean()
    total.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.cat([part.grad for part in inputs if part.grad is not None]), reference.grad)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_padding_adds_nothing_to_the_weight_of_the_unsupervised_loss(ranks):
    """Its value is that of the images without their padding, wherever that lies."""
    logits, target = _batch()
    shown = torch.ones(4, 6, 7, dtype=torch.bool)
    shown[0, 3:], shown[2, :, 2:], shown[3] = False, False, False
    target = target.masked_fill(~shown, IGNORE)
    expected = F.cross_entropy(logits, target, ignore_index=IGNORE) * shown.sum() / (target != IGNORE).sum()
    parts = [each.chunk(ranks) for each in (logits, target, shown)]
    shares = on_ranks(ranks, lambda w: unsupervised_cross_entropy(*[part[w.rank] for part in parts], world=w))
    torch.testing.assert_close(torch.stack(shares).mean(), expected)


WEIGHTS = torch.tensor([0.5, 2.0, 0.0])


def _focal(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The words of the docstring, pixel by pixel, with gamma 2."""
    total, weights = torch.zeros(()), 0.0
    for b, y, x in (target != IGNORE).nonzero().tolist():
        own = int(target[b, y, x])
        probability = logits[b, :, y, x].softmax(0)[own]
        total = total - WEIGHTS[own] * (1 - probability) ** 2 * probability.log()
        weights += float(WEIGHTS[own])
    return total / weights


def _dice(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    valid, losses = target != IGNORE, []
    for own in range(logits.shape[1]):
        found, truth = logits.softmax(1)[:, own][valid], (target == own)[valid].float()
        if truth.any():
            losses.append(1 - 2 * (found * truth).sum() / (found.sum() + truth.sum()))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("loss", "slow"),
    [
        (lambda logits, target, world: focal_cross_entropy(logits, target, world, WEIGHTS, 2.0), _focal),
        (dice_loss, _dice),
    ],
    ids=["weighted and focal", "dice"],
)
def test_losses_of_unequal_classes_are_those_of_the_global_batch(loss, slow, ranks):
    """Value and gradient as DDP averages them; one image is ignored as a whole, and class 1 is in one image alone."""
    logits, target = _batch()
    target[1:][target[1:] == 1] = 2
    reference = logits.clone().requires_grad_()
    expected = slow(reference, target)
    expected.backward()
    inputs = [part.clone().requires_grad_() for part in logits.chunk(ranks)]
    total = torch.stack(on_ranks(ranks, lambda w: loss(inputs[w.rank], target.chunk(ranks)[w.rank], w))).mean()
    total.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.cat([part.grad for part in inputs if part.grad is not None]), reference.grad)


def test_the_weighted_mean_is_that_of_torch():
    logits, target = _batch()
    expected = F.cross_entropy(logits, target, WEIGHTS, ignore_index=IGNORE)
    torch.testing.assert_close(focal_cross_entropy(logits, target, World(), WEIGHTS), expected)


def test_a_class_that_the_batch_does_not_show_has_no_dice():
    logits, target = _batch()
    target[target == 1] = 2
    torch.testing.assert_close(dice_loss(logits, target, World()), _dice(logits, target))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_pixel_that_is_surely_right_has_a_finite_slope(gamma):
    logits = torch.tensor([[200.0, -200.0, 0.0]]).view(1, 3, 1, 1).requires_grad_()
    focal_cross_entropy(logits, torch.zeros(1, 1, 1, dtype=torch.int64), World(), None, gamma).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy, unsupervised, focal_cross_entropy, dice_loss])
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


SMALL, SIZE = (4, 3), (13, 9)
GRIDS = [FullGrid(SIZE, SMALL), QuarterGrid(SIZE, SMALL)]


def _coarse() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the network's resolution; the images' shares of ignored pixels differ."""
    torch.manual_seed(1)
    target = torch.randint(0, 5, (4, *SIZE))
    target[torch.rand(target.shape) < torch.tensor([0.1, 0.9, 0.5, 1.0]).view(4, 1, 1)] = IGNORE
    return torch.randn(4, 5, *SMALL), target


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: type(grid).__name__)
@pytest.mark.parametrize("loss", [cross_entropy, unsupervised])
@pytest.mark.parametrize("ranks", [1, 2])
def test_with_a_grid_the_loss_is_that_of_resized_logits(loss, grid: Grid, ranks):
    """The places of a grid that are no pixels count nowhere, neither in the mean nor in the weight of L_u."""
    coarse, target = _coarse()
    reference = coarse.clone().requires_grad_()
    expected = loss(upsample(reference, SIZE), target, World())
    expected.backward()
    leaf = coarse.clone().requires_grad_()
    parts, targets = leaf.chunk(ranks), target.chunk(ranks)
    total = torch.stack(on_ranks(ranks, lambda w: loss(parts[w.rank], grid.arrange(targets[w.rank]), w, grid))).mean()
    total.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(leaf.grad, reference.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: type(grid).__name__)
@pytest.mark.parametrize("loss", [cross_entropy, unsupervised])
def test_with_a_grid_nothing_known_is_loss_0(loss, grid: Grid):
    leaf = _coarse()[0].requires_grad_()
    value = loss(leaf, grid.arrange(torch.full((4, *SIZE), IGNORE)), World(), grid)
    value.backward()
    assert value == 0
    assert leaf.grad is not None
    assert not leaf.grad.any()


def test_mean_count_is_at_least_1():
    mask = torch.tensor([[True, True, True], [False, False, False]])
    assert mean_count(mask, World()) == 3
    assert mean_count(mask[1], World()) == 1
    assert [float(count) for count in on_ranks(2, lambda w: mean_count(mask[w.rank], w))] == [1.5, 1.5]
