"""The quarter grid against the full one and against float64, uncompiled: the code that the compiler gets."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import grid as grids
from pipeline.ops import kernel
from pipeline.ops.entropy import IGNORE, entropy
from pipeline.ops.grid import FullGrid, Grid, QuarterGrid, make_grid, shrink, upsample

SHAPES = [(2, 5, 9, 6), (1, 2, 2, 2), (2, 21, 5, 12), (1, 19, 2, 7), (3, 3, 4, 2), (1, 21, 17, 9)]
"""B, C, h, w of logits; 2 x 2 is the least: labels of 5 x 5 pixels."""
FLOOR = grids._FLOOR * math.log(2.0)
"""Least log-probability that the quarter grid can tell from smaller ones."""


def _size(small: tuple[int, int]) -> tuple[int, int]:
    return 4 * (small[0] - 1) + 1, 4 * (small[1] - 1) + 1


def _both(shape: tuple[int, ...]) -> tuple[QuarterGrid, FullGrid]:
    small = (shape[2], shape[3])
    return QuarterGrid(_size(small), small), FullGrid(_size(small), small)


def _logits(shape: tuple[int, ...], scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def _target(shape: tuple[int, ...], ignored: float = 0.3) -> Tensor:
    generator, size = torch.Generator().manual_seed(1), (shape[0], *_size((shape[2], shape[3])))
    target = torch.randint(0, shape[1], size, generator=generator)
    return target.masked_fill(torch.rand(size, generator=generator) < ignored, IGNORE)


def _image(grid: Grid, values: Tensor) -> Tensor:
    """Values in the grid's order as an image: what lies at each pixel's number."""
    numbers = torch.arange(grid.size[0] * grid.size[1]).view(1, *grid.size)
    blocks = len(values), -1, 4, 4, grid.small[1]
    whole = values.view(blocks).transpose(3, 4).reshape(len(values), 4 * grid.small[0], 4 * grid.small[1])
    assert numbers.shape[1:] == grid.size
    return whole[:, : grid.size[0], : grid.size[1]]


def _peaks(shape: tuple[int, ...], gap: float) -> Tensor:
    """One class at each pixel leads all others by `gap`."""
    winner = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(2))
    return gap * F.one_hot(winner, shape[1]).movedim(3, 1).float()


def _exact_entropy(logits: Tensor, grid: Grid) -> Tensor:
    log = upsample(logits.double(), grid.size).log_softmax(1)
    return -(log.exp() * log).sum(1)


# ---- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_arrange_puts_each_pixel_at_its_cell_and_phase(shape):
    quarter, full = _both(shape)
    label = _target(shape)
    found = quarter.arrange(label)
    assert found.shape == (shape[0], shape[2], 16, shape[3])
    expected = torch.full(found.shape, float(IGNORE))
    for y in range(label.shape[1]):
        for x in range(label.shape[2]):
            expected[:, y // 4, y % 4 * 4 + x % 4, x // 4] = label[:, y, x].float()
    assert torch.equal(found, expected)
    assert torch.equal(_image(quarter, found), label.float())
    assert full.arrange(label) is label


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_arrange_takes_labels_of_any_integer_type(dtype):
    shape = SHAPES[0]
    quarter, _ = _both(shape)
    assert torch.equal(quarter.arrange(_target(shape).to(dtype)), quarter.arrange(_target(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_shrink_is_the_same_pixel_in_both_orders(shape):
    quarter, full = _both(shape)
    label = _target(shape)
    expected = shrink(label, full.small)
    assert torch.equal(full.shrink(label), expected)
    assert torch.equal(quarter.shrink(quarter.arrange(label)).long(), expected)
    mask = quarter.shrink(quarter.arrange(label) == IGNORE)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected == IGNORE)


@pytest.mark.parametrize(
    ("large", "small"), [((33, 10), (9, 4)), ((33, 41), (9, 11)), ((7, 5), (7, 5)), ((8, 8), (2, 3))]
)
def test_shrink_takes_the_source_index_rounded_down(large, small):
    values = torch.arange(2 * large[0] * large[1]).view(2, *large)
    found = shrink(values, small)
    for y in range(small[0]):
        for x in range(small[1]):
            assert torch.equal(found[:, y, x], values[:, y * large[0] // small[0], x * large[1] // small[1]])


# ---- labels -----------------------------------------------------------------------------------------------------


def _assert_same_labels(logits: Tensor, quarter: Grid) -> None:
    """The likeliest class of every pixel, except where the two leading ones tie in the last bits."""
    found, exact = quarter.label(logits), upsample(logits.double(), quarter.size)
    assert found.dtype == torch.int64
    assert found.shape == (len(logits), *quarter.size)
    lost = exact.amax(1) - exact.gather(1, found.unsqueeze(1)).squeeze(1)
    assert lost.max() <= 1e-5 * logits.float().abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_are_those_of_the_resized_logits(shape, dtype):
    quarter, full = _both(shape)
    logits = _logits(shape).to(dtype)
    _assert_same_labels(logits, quarter)
    assert (quarter.label(logits) == full.label(logits)).float().mean() > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_of_sure_logits(shape):
    _assert_same_labels(_peaks(shape, 50.0), _both(shape)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_gpus_get_the_labels_of_cpus(shape):
    corners = grids._corners(_logits(shape), -math.inf)
    assert torch.equal(grids._argmax(corners), grids._likeliest(corners).long())


def test_a_label_is_a_class_whatever_the_logits():
    quarter, _ = _both(SHAPES[0])
    logits = _logits(SHAPES[0])
    logits[0, 2, 4, 3] = math.nan
    assert set(quarter.label(logits).unique().tolist()) <= set(range(5))


def test_labels_of_logits_with_gaps_beyond_the_floor():
    for seed in range(3):
        _assert_same_labels(_logits(SHAPES[2], 40.0, seed), _both(SHAPES[2])[0])


def test_equal_logits_give_the_first_class():
    for grid in _both((1, 4, 3, 3)):
        assert not grid.label(torch.zeros(1, 4, 3, 3)).any()


# ---- entropy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_is_that_of_the_resized_logits(shape, dtype):
    quarter, full = _both(shape)
    logits = _logits(shape).to(dtype)
    expected = _exact_entropy(logits, full).float()
    found = quarter.entropy(logits)
    assert found.dtype == full.entropy(logits).dtype == torch.float32
    torch.testing.assert_close(full.entropy(logits), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(_image(quarter, found), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_logits_have_the_largest_entropy(shape):
    for grid in _both(shape):
        found = grid.entropy(torch.full(shape, 7.0))
        torch.testing.assert_close(found, torch.full_like(found, math.log(shape[1])), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gap", [40.0, 55.0])
def test_entropy_between_sure_pixels_of_different_classes(gap):
    """Where corners disagree, products of exponentials span most of what float32 holds."""
    for shape in SHAPES:
        quarter, full = _both(shape)
        logits = _peaks(shape, gap)
        torch.testing.assert_close(
            _image(quarter, quarter.entropy(logits)), _exact_entropy(logits, full).float(), rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("gap", [100.0, 1e4, 1e30])
def test_beyond_the_floor_everything_is_as_if_logits_ended_there(gap):
    for shape in SHAPES:
        quarter, full = _both(shape)
        for logits in (_peaks(shape, gap), _logits(shape, gap)):
            floored = logits.double().log_softmax(1).clamp_min(FLOOR)
            found = _image(quarter, quarter.entropy(logits))
            assert (found >= 0).all()
            torch.testing.assert_close(found, _exact_entropy(floored, full).float(), rtol=0, atol=5e-5)
            loss, gradient = _loss_and_gradient(quarter, logits, _target(shape))
            expected, slope = _loss_and_gradient(full, floored, _target(shape))
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradient, slope, rtol=0, atol=5e-5)


def test_entropy_has_no_gradient_in_the_quarter_grid():
    quarter, _ = _both(SHAPES[0])
    assert not quarter.entropy(_logits(SHAPES[0]).requires_grad_()).requires_grad


# ---- cross entropy ----------------------------------------------------------------------------------------------


def _loss_and_gradient(grid: Grid, logits: Tensor, target: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Float64 from both; a float64 input to the full grid is resized as such, the grid itself would make it float32."""
    leaf = logits.clone().requires_grad_()
    if logits.dtype == torch.float64:
        loss = F.cross_entropy(upsample(leaf, grid.size), target, ignore_index=IGNORE, reduction="sum")
    else:
        loss = grid.cross_entropy(leaf, grid.arrange(target))
    (loss * weight).backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == logits.dtype
    return loss.detach().double(), leaf.grad.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_cross_entropy_and_gradient_against_float64(shape, scale):
    quarter, full = _both(shape)
    logits, target = _logits(shape, scale), _target(shape)
    expected, slope = _loss_and_gradient(full, logits.double(), target)
    for grid in (quarter, full):
        loss, gradient = _loss_and_gradient(grid, logits, target)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, slope, rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_between_sure_pixels_of_different_classes(shape):
    quarter, full = _both(shape)
    logits, target = _peaks(shape, 50.0), _target(shape)
    expected, slope = _loss_and_gradient(full, logits.double(), target)
    loss, gradient = _loss_and_gradient(quarter, logits, target)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=0, atol=3e-5)


def test_the_gradient_is_scaled_by_what_comes_from_above():
    quarter, _ = _both(SHAPES[0])
    logits, target = _logits(SHAPES[0]), _target(SHAPES[0])
    once, thrice = (_loss_and_gradient(quarter, logits, target, weight)[1] for weight in (1.0, -3.0))
    torch.testing.assert_close(thrice, -3.0 * once)


def test_one_pixel_reaches_only_the_corners_of_its_cell():
    quarter, _ = _both((1, 3, 4, 4))
    target = torch.full((1, 13, 13), IGNORE)
    target[0, 6, 9] = 2  # cell (1, 2), half way down and a quarter across
    _, gradient = _loss_and_gradient(quarter, torch.zeros(1, 3, 4, 4), target)
    weights = torch.zeros(4, 4, dtype=torch.float64)
    weights[1:3, 2:4] = torch.tensor([[0.375, 0.125], [0.375, 0.125]])
    torch.testing.assert_close(gradient[0, 0], weights / 3)
    torch.testing.assert_close(gradient[0, 2], weights * (1 / 3 - 1))


def test_the_last_row_and_column_count():
    for y, x in ((12, 12), (12, 0), (0, 12), (12, 7)):
        target = torch.full((1, 13, 13), IGNORE)
        target[0, y, x] = 1
        quarter, full = _both((1, 3, 4, 4))
        logits = _logits((1, 3, 4, 4))
        expected, slope = _loss_and_gradient(full, logits.double(), target)
        loss, gradient = _loss_and_gradient(quarter, logits, target)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, slope, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
def test_bfloat16_logits_get_a_bfloat16_gradient(shape):
    quarter, full = _both(shape)
    logits, target = _logits(shape).bfloat16(), _target(shape)
    expected, slope = _loss_and_gradient(full, logits.double(), target)
    for grid in (quarter, full):
        loss, gradient = _loss_and_gradient(grid, logits, target)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, slope, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("gap", [1.0, 1e4])
def test_nothing_known_is_loss_0_with_gradient_0(gap):
    for shape in SHAPES:
        for grid in _both(shape):
            nothing = torch.full((shape[0], *grid.size), IGNORE)
            loss, gradient = _loss_and_gradient(grid, _logits(shape, gap), nothing)
            assert loss == 0
            assert (gradient == 0).all()  # and finite


# ---- the choice -------------------------------------------------------------------------------------------------

EXACT = [((513, 513), (129, 129)), ((33, 21), (9, 6)), ((5, 5), (2, 2))]
OTHER = [((512, 512), (128, 128)), ((33, 32), (9, 8)), ((32, 33), (8, 9)), ((33, 33), (33, 33)), ((33, 33), (5, 5))]


def test_uncompiled_the_full_grid_is_chosen():
    for size, small in EXACT + OTHER:
        grid = make_grid(size, small)
        assert type(grid) is FullGrid
        assert (grid.size, grid.small) == (size, small)


def test_compiled_the_quarter_grid_is_chosen_where_it_is_exact(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "_active", True)
    for size, small in EXACT:
        grid = make_grid(size, small)
        assert type(grid) is QuarterGrid
        assert (grid.size, grid.small) == (size, small)
    for size, small in OTHER:
        assert type(make_grid(size, small)) is FullGrid


def test_the_full_grid_serves_any_size():
    logits, grid = _logits((2, 5, 4, 7)), FullGrid((11, 20), (4, 7))
    full = upsample(logits, (11, 20))
    assert torch.equal(grid.label(logits), full.argmax(1))
    assert torch.equal(grid.entropy(logits), entropy(full))
    assert grid.shrink(grid.label(logits)).shape == (2, 4, 7)


def test_upsample_aligns_the_corners():
    small = torch.tensor([[[[0.0, 4.0], [8.0, 20.0]]]])
    found = upsample(small, (5, 5))[0, 0]
    assert found[0].tolist() == [0, 1, 2, 3, 4]
    assert found[:, 0].tolist() == [0, 2, 4, 6, 8]
    assert found[2, 2] == 8
