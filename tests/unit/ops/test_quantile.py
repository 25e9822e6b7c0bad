import numpy as np
import pytest
import torch

from pipeline.ops.entropy import masked_quantile, quantile
from pipeline.ops.world import World
from tests.unit.ops.worlds import on_ranks

Q = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.987, 1.0])


def _values(kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    values = {
        "spread": torch.rand(4, 20, 21) * 3,
        "tiny": torch.rand(4, 20, 21) * 1e-40,  # subnormal
        "ties": torch.randint(0, 4, (4, 20, 21)).float(),
        "equal": torch.full((4, 20, 21), 1.5),
        "wide": torch.exp(torch.randn(4, 20, 21) * 20),
    }
    return values[kind]


KINDS = ["spread", "tiny", "ties", "equal", "wide"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_quantiles_are_those_of_numpy(kind, ranks):
    values = _values(kind)
    mask = torch.rand(values.shape) > 0.3
    expected = np.quantile(values[mask].double().numpy(), Q.double().numpy())
    shares = values.chunk(ranks), mask.chunk(ranks)
    for found in on_ranks(ranks, lambda w: masked_quantile(shares[0][w.rank], shares[1][w.rank], Q, w)):
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-6, atol=2e-45)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nan_is_left_out(ranks):
    values = _values("spread")
    mask, damaged = torch.rand(values.shape) > 0.3, torch.rand(values.shape) > 0.8
    damaged[:2] |= torch.rand(2, 20, 21) > 0.2  # most on one rank
    expected = masked_quantile(values, mask & ~damaged, Q, World())
    spoilt = torch.where(damaged, torch.where(torch.rand(values.shape) > 0.5, torch.nan, -torch.nan), values)
    shares = spoilt.chunk(ranks), mask.chunk(ranks)
    for found in on_ranks(ranks, lambda w: masked_quantile(shares[0][w.rank], shares[1][w.rank], Q, w)):
        assert torch.equal(found, expected)


def test_only_nan_masked_in_is_nothing():
    values = torch.tensor([torch.nan, 1.0, torch.nan])
    assert masked_quantile(values, values.isnan(), Q, World()).isnan().all()


def test_one_value_is_every_quantile():
    values = torch.rand(100)
    for index in (0, 57, 99):
        mask = torch.arange(100) == index
        assert (masked_quantile(values, mask, Q, World()) == values[index]).all()


def test_layout_and_shape_do_not_matter():
    values = torch.rand(4, 6, 5)
    mask = values > 0.2
    expected = masked_quantile(values, mask, Q, World())
    assert torch.equal(masked_quantile(values.permute(2, 0, 1), mask.permute(2, 0, 1), Q, World()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_find_the_quantiles_of_one(kind):
    values = _values(kind)
    mask = torch.rand(values.shape) > 0.3
    alone = masked_quantile(values, mask, Q, World())
    for found in on_ranks(2, lambda w: masked_quantile(values[w.rank * 2 :][:2], mask[w.rank * 2 :][:2], Q, w)):
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=0)
        for one, two in zip(alone, found, strict=True):  # what counts: the partition they make
            assert ((values < one) != (values < two)).logical_and(mask).sum() <= 1


def test_order_statistics_are_exact():
    values = _values("spread").flatten()[:1001]
    q = torch.tensor([0.0, 0.25, 0.5, 1.0])  # of 1001 values these fall on one value
    expected = torch.from_numpy(np.quantile(values.numpy(), q.numpy()).astype(np.float32))
    mask = torch.ones(1001, dtype=torch.bool)
    parts = values[:300], values[300:]
    for found in on_ranks(2, lambda w: masked_quantile(parts[w.rank], torch.ones_like(parts[w.rank]) > 0, q, w)):
        assert torch.equal(found, expected)
    assert torch.equal(masked_quantile(values, mask, q, World()), expected)


def test_a_rank_without_values_has_the_others_threshold():
    values, mask = torch.arange(10.0), torch.ones(10, dtype=torch.bool)
    results = on_ranks(2, lambda w: masked_quantile(values, mask & (w.rank == 1), torch.tensor([0.5]), w))
    assert [float(r) for r in results] == [4.5, 4.5]


@pytest.mark.parametrize("ranks", [1, 2])
def test_nan_where_nothing_is_masked_in(ranks):
    values = torch.rand(3, 4)
    for found in on_ranks(ranks, lambda w: masked_quantile(values, torch.zeros(3, 4, dtype=torch.bool), Q, w)):
        assert found.isnan().all()
        assert not (values < found[0]).any()
        assert not (values >= found[0]).any()


def test_negative_zero_is_zero():
    values = torch.tensor([-0.0, 0.0, 1.0, 2.0])
    mask = torch.ones(4, dtype=torch.bool)
    for found in on_ranks(2, lambda w: masked_quantile(values, mask, torch.tensor([0.0, 1.0]), w)):
        assert found.tolist() == [0.0, 2.0]


def test_no_gradient_flows():
    values = torch.rand(5, requires_grad=True)
    assert not masked_quantile(values, torch.ones(5, dtype=torch.bool), Q, World()).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_quantile_of_one_tensor_is_that_of_numpy(kind):
    values = _values(kind).flatten()
    for share in Q:
        expected = np.quantile(values.double().numpy(), share.double().item())
        np.testing.assert_allclose(quantile(values, share).double().item(), expected, rtol=1e-6, atol=2e-45)
    assert quantile(values[:0], Q[1]).isnan()
