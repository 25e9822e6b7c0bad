import pytest
import torch
from torch import Tensor

from pipeline.ops.selection import Members, Segments, draw_rank, rows, take

LARGEST = 1 - 2**-24


def _mask(pixels: int = 300) -> Tensor:
    torch.manual_seed(0)
    mask = torch.rand(5, pixels) < torch.tensor([0.5, 0.02, 1.0, 0.0, 0.9]).view(5, 1)
    mask[4, :50] = False
    return mask


# ---- sets that may overlap --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [1, 2, 127, 128, 129, 256, 300, 1000])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_lookup_finds_the_members_in_order(pixels, dtype):
    mask = _mask(pixels)
    members = Members(mask.to(dtype))
    assert members.count.dtype == torch.int64
    found = members.lookup(torch.arange(pixels).expand(5, -1))
    assert ((found >= 0) & (found < pixels)).all()  # also where there is no such member
    for label, row in enumerate(mask):
        expected = row.nonzero().flatten()
        assert members.count[label] == len(expected)
        assert torch.equal(found[label, : len(expected)], expected)


def test_members_far_apart_are_found():
    mask = torch.zeros(2, 1280, dtype=torch.uint8)
    mask[0, [0, 127, 128, 640, 1279]] = 1
    mask[1, 1151] = 1
    found = Members(mask).lookup(torch.tensor([[4, 3, 2, 1, 0], [0, 0, 0, 0, 0]]))
    assert found.tolist() == [[1279, 640, 128, 127, 0], [1151] * 5]


def test_a_mask_in_another_memory_order_will_do():
    mask = _mask(256)
    for view in (mask.t().contiguous().t(), torch.cat([mask, mask], 1)[:, :256]):
        assert not view.is_contiguous()
        assert torch.equal(Members(view).count, mask.sum(1))
        assert torch.equal(Members(view).draw(torch.full((5, 3), 0.4)), Members(mask).draw(torch.full((5, 3), 0.4)))


@pytest.mark.parametrize("uniform", [0.0, 0.5, LARGEST])
def test_draws_are_members(uniform):
    mask = _mask()
    members = Members(mask)
    index = members.draw(torch.full((5, 7), uniform))
    for label in (0, 1, 2, 4):
        inside = mask[label].nonzero().flatten()
        assert (index[label] == inside[min(int(uniform * len(inside)), len(inside) - 1)]).all()
    assert ((index[3] >= 0) & (index[3] < 300)).all()  # empty: any pixel, but one that exists


def test_draws_are_uniform():
    mask = torch.zeros(1, 100, dtype=torch.bool)
    mask[0, 10:20] = True
    torch.manual_seed(0)
    index = Members(mask).draw(torch.rand(1, 20_000))
    counts = torch.bincount(index[0], minlength=100)[10:20]
    assert counts.sum() == 20_000
    assert (counts - 2000).abs().max() < 200  # 4.7 standard deviations


@pytest.mark.parametrize("strata", [1, 4, 149, 150, 256, 299, 300, 400])
def test_stratified_is_complete_or_distinct(strata):
    mask = _mask()
    members = Members(mask)
    torch.manual_seed(0)
    noise = torch.rand(5, strata)
    alternating = torch.where(torch.arange(strata) % 2 == 0, LARGEST, 0.0).expand(5, -1)  # neighbours come closest
    for uniform in (noise, alternating, torch.zeros(5, strata)):
        index, valid = members.stratified(uniform)
        for label, row in enumerate(mask):
            inside, chosen = row.nonzero().flatten(), index[label][valid[label]]
            assert len(chosen) == min(strata, len(inside))
            assert torch.equal(chosen, chosen.unique())  # distinct, and in order
            assert row[chosen].all()
            assert valid[label].int().diff().le(0).all()  # valid ones come first


def test_stratified_of_a_large_set_spans_it():
    mask = torch.ones(1, 3_000_001, dtype=torch.bool)
    index, valid = Members(mask).stratified(torch.full((1, 256), LARGEST))
    assert valid.all()
    expected = torch.arange(1, 257) * 3_000_001 // 256 - 1  # the last one of each stratum, in whole numbers
    assert torch.equal(index[0], expected)


def test_draw_rank_stays_inside():
    count = torch.tensor([0, 1, 3, 16_777_217, 50_000_000])
    for uniform in (0.0, 0.5, LARGEST):
        rank = draw_rank(torch.full((5,), uniform), count)
        assert rank.dtype == torch.int64
        assert ((rank >= 0) & (rank <= (count - 1).clamp_min(0))).all()
    assert draw_rank(torch.tensor([0.0, 0.34, 0.99]), torch.tensor([3])).tolist() == [0, 1, 2]


# ---- disjoint sets ----------------------------------------------------------------------------------------------

SETS = 6


def _numbers(pixels: int, kind: str = "mixed") -> Tensor:
    """Sets 2 and 5 are empty; `SETS` is none."""
    torch.manual_seed(1)
    choice = {"mixed": [0, 1, 3, 4, SETS], "all in": [0, 1, 3, 4], "none in": [SETS], "one set": [3]}[kind]
    return torch.tensor(choice)[torch.randint(0, len(choice), (pixels,))].to(torch.int16)


KINDS = ["mixed", "all in", "none in", "one set"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pixels", [1, 40, 700])
def test_segments_draw_in_pixel_order(pixels, kind):
    number = _numbers(pixels, kind)
    segments = Segments(number, SETS)
    assert segments.count.tolist() == [(number == s).sum() for s in range(SETS)]
    torch.manual_seed(2)
    uniform = torch.cat([torch.rand(SETS, 50), torch.tensor([0.0, LARGEST]).expand(SETS, 2)], 1)
    found = segments.draw(uniform)
    assert ((found >= 0) & (found < pixels)).all()  # also of an empty set
    for s in range(SETS):
        inside = (number == s).nonzero().flatten()
        if len(inside):
            rank = (uniform[s] * len(inside)).long().clamp_max(len(inside) - 1)
            assert torch.equal(found[s], inside[rank])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pixels", [1, 40, 511, 512, 513, 1024, 3000])
def test_segments_sum_their_rows(pixels, kind):
    number = _numbers(pixels, kind)
    values = torch.randn(pixels, 5)
    found = Segments(number, SETS).sums(values)
    assert found.dtype == torch.float32
    expected = torch.stack([values.double()[number == s].sum(0) for s in range(SETS)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_segments_sum_half_precision_rows(dtype, tolerance):
    """Features of one sign, as after a ReLU: a sum kept in half precision would stop growing."""
    number = _numbers(20_000)
    values = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = Segments(number, SETS).sums(values)
    assert found.dtype == torch.float32
    expected = torch.stack([values.double()[number == s].sum(0) for s in range(SETS)])
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)


def test_what_lies_outside_all_sets_does_not_reach_a_sum():
    number = _numbers(1500)
    values = torch.ones(1500, 3)
    values[number == SETS] = torch.nan
    found = Segments(number, SETS).sums(values)
    assert torch.equal(found, Segments(number, SETS).count[:, None].float().expand(-1, 3))


# ---- rows of feature maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_are_the_pixels_in_order(layout):
    features = torch.randn(2, 3, 4, 5).to(memory_format=layout)
    found = rows(features)
    assert found.shape == (40, 3)
    for b, y, x in torch.cartesian_prod(*map(torch.arange, (2, 4, 5))).tolist():
        assert torch.equal(found[b * 20 + y * 5 + x], features[b, :, y, x])
    assert (found.data_ptr() == features.data_ptr()) == (layout is torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_a_repeated_row_adds_up(layout):
    features = torch.randn(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
    index = torch.tensor([[0, 39, 7], [21, 21, 21]])
    found = take(rows(features), index)
    flat = features.detach().permute(0, 2, 3, 1).reshape(40, 3)
    assert torch.equal(found, flat[index])
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (found * weights[..., None]).sum().backward()
    assert features.grad is not None
    expected = torch.zeros(2, 4, 5)
    expected[0, 0, 0], expected[1, 3, 4], expected[0, 1, 2], expected[1, 0, 1] = 1, 2, 3, 15
    assert torch.equal(features.grad, expected[:, None].expand(-1, 3, -1, -1))


def test_take_keeps_the_shape_of_the_index():
    values = torch.randn(10, 3)
    for shape in ((4,), (2, 3), (2, 3, 4)):
        index = torch.randint(0, 10, shape)
        assert torch.equal(take(values, index), values[index])
