import pytest
import torch

from pipeline.ops.mixing import Boxes, box_masks, class_boxes, cutout, inside, small_box_masks

SIZES = [(64, 64), (129, 129), (33, 57), (57, 33)]


def _draws(*shape: int) -> torch.Tensor:
    """Random ones, and the two extremes."""
    torch.manual_seed(0)
    draws = torch.rand(200, *shape)
    draws[0], draws[1] = 0, 1 - 2**-24
    return draws


@pytest.mark.parametrize("size", SIZES)
def test_one_box_is_whole_and_of_the_area_asked_for(size):
    masks = box_masks(_draws(1, 4), size, (0.5, 0.5))
    rows, columns, area = masks.any(2).sum(1), masks.any(1).sum(1), masks.sum((1, 2))
    assert torch.equal(area, rows * columns)
    error = (area - size[0] * size[1] / 2).abs()
    assert (error <= (rows + columns) / 2 + 1).all()  # both sides are rounded
    assert rows[1:].min() <= size[0] * 0.55
    assert rows.max() == size[0]
    assert masks[1, -1, -1]


@pytest.mark.parametrize("size", SIZES)
def test_three_boxes_against_a_drawing(size):
    """Pixel by pixel from the words of the reference; overlaps cancel out."""
    height, width = size
    draws = _draws(3, 4)[:20].double()
    masks = box_masks(draws, size, (0.25, 0.5))
    for mask, boxes in zip(masks, draws.tolist(), strict=True):
        expected = torch.zeros(size, dtype=torch.bool)
        for area, aspect, top, left in boxes:
            share = 0.25 + 0.25 * area
            h = round(share**aspect / 3**0.5 * height)
            w = round(share / share**aspect / 3**0.5 * width)
            y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
            expected[y : y + h, x : x + w] ^= True
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("size", SIZES)
def test_small_boxes_are_whole_and_within_the_ranges(size):
    masks = small_box_masks(_draws(4), size)
    rows, columns, area = masks.any(2).sum(1), masks.any(1).sum(1), masks.sum((1, 2)).float()
    assert torch.equal(area, (rows * columns).float())
    share = area / (size[0] * size[1])
    assert 0.01 < share.min() < 0.06
    assert 0.3 < share.max() < 0.42
    inside = (rows < size[0]) & (columns < size[1])
    aspect = (rows / size[0]) / (columns / size[1])
    assert (aspect[inside] > 0.2).all()
    assert (aspect[inside] < 4.5).all()
    assert masks.any(0).float().mean() > 0.95  # nearly anywhere


def test_boxes_against_a_loop_over_pixels():
    torch.manual_seed(0)
    label = torch.randint(0, 12, (3, 7, 9))
    label[0, 0] = 255
    boxes = class_boxes(label, 10)
    mask = inside(boxes, (7, 9))
    for b in range(3):
        for k in range(10):
            pixels = (label[b] == k).nonzero()
            found = [int(side[b, k]) for side in boxes]
            if not len(pixels):
                assert found == [0, 0, 0, 0]
                assert not mask[b, k].any()
                continue
            (top, left), (bottom, right) = pixels.amin(0).tolist(), pixels.amax(0).tolist()
            assert found == [top, left, bottom - top + 1, right - left + 1]
            expected = torch.zeros(7, 9, dtype=torch.bool)
            expected[top : bottom + 1, left : right + 1] = True
            assert torch.equal(mask[b, k], expected)


def test_boxes_may_reach_beyond_the_image():
    one = torch.ones(1, dtype=torch.long)
    mask = inside(Boxes(-2 * one, 3 * one, 4 * one, 9 * one), (5, 6))[0]
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[:2, 3:] = True
    assert torch.equal(mask, expected)


def test_cutout_is_a_rectangle_around_any_pixel():
    draws = torch.tensor([[0.5, 0.5], [0.0, 0.999]])
    hole = cutout(draws, (20, 10), 0.2)  # 4 x 2
    expected = torch.zeros(2, 20, 10, dtype=torch.bool)
    expected[0, 8:12, 4:6] = True
    expected[1, 0:2, 8:10] = True
    assert torch.equal(hole, expected)
