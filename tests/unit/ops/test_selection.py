import pytest
import torch

from pipeline.ops.selection import Members, rows

LARGEST = 1 - 2**-24


def _mask() -> torch.Tensor:
    torch.manual_seed(0)
    mask = torch.rand(5, 300) < torch.tensor([0.5, 0.02, 1.0, 0.0, 0.9]).view(5, 1)
    mask[4, :50] = False
    return mask


def test_lookup_finds_the_members_in_order():
    mask = _mask()
    members = Members(mask)
    for label, row in enumerate(mask):
        expected = row.nonzero().flatten()
        assert members.count[label] == len(expected)
        found = members.lookup(torch.arange(300).expand(5, -1))[label, : len(expected)]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("uniform", [0.0, 0.5, LARGEST])
def test_draws_are_members(uniform):
    mask = _mask()
    members = Members(mask)
    index = members.draw(torch.full((5, 7), uniform))
    for label in (0, 1, 2, 4):
        inside = mask[label].nonzero().flatten()
        assert (index[label] == inside[int(uniform * len(inside))]).all()
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


def test_rows_of_a_feature_map():
    features = torch.randn(2, 3, 4, 5, requires_grad=True)
    index = torch.tensor([[0, 39], [21, 21]])
    found = rows(features, index)
    flat = features.detach().permute(0, 2, 3, 1).reshape(40, 3)
    assert torch.equal(found, flat[index])
    found.sum().backward()
    assert features.grad is not None
    assert features.grad[1, :, 0, 1].tolist() == [2, 2, 2]  # pixel 21 twice
    assert features.grad.sum() == 12
