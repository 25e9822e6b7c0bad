import pytest
import torch
from torch import Tensor

from pipeline.ops import entropy as ops
from pipeline.ops.entropy import Partition, entropy, reliable_labels
from pipeline.ops.world import World
from tests.unit.ops.worlds import on_ranks


def partition(values: Tensor, known: Tensor, alpha: Tensor, world: World) -> Partition:
    return ops.partition(values, known, ops.threshold(values, known, alpha, world))


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1000.0])
def test_entropy(scale):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, 6) * scale + 100
    expected = torch.distributions.Categorical(logits=logits.double().movedim(1, -1)).entropy()
    found = entropy(logits)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (found >= 0).all()


def test_entropy_of_half_precision_logits_is_float32():
    logits = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(entropy(logits), entropy(logits.float()))


@pytest.mark.parametrize("alpha", [0.2, 0.05])
def test_the_share_alpha_is_unreliable_over_all_ranks(alpha):
    torch.manual_seed(0)
    values, known = torch.rand(4, 20, 20), torch.ones(4, 20, 20, dtype=torch.bool)
    known[3, :15] = False
    share = torch.tensor(alpha)
    alone = partition(values, known, share, World())
    assert torch.equal(alone.reliable | alone.unreliable, known)
    assert not (alone.reliable & alone.unreliable).any()
    assert float(alone.unreliable.sum() / known.sum()) == pytest.approx(alpha, abs=1e-3)
    assert values[alone.unreliable].min() >= ops.threshold(values, known, share, World()) > values[alone.reliable].max()
    parts = on_ranks(2, lambda w: partition(values[2 * w.rank :][:2], known[2 * w.rank :][:2], share, w))
    assert torch.equal(torch.cat([part.reliable for part in parts]), alone.reliable)
    assert torch.equal(torch.cat([part.unreliable for part in parts]), alone.unreliable)


def test_a_pixel_at_the_threshold_is_unreliable():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    assert ops.threshold(values, values >= 0, torch.tensor(0.5), World()) == 2
    parts = partition(values, values >= 0, torch.tensor(0.5), World())
    assert parts.unreliable.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(("alpha", "unreliable"), [(0.0, 1), (1.0, 5)])
def test_the_ends_of_the_schedule(alpha, unreliable):
    """With nothing to drop, the pixel of the largest entropy still is at the threshold, as in the release."""
    values = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0])
    parts = partition(values, values >= 0, torch.tensor(alpha), World())
    assert parts.unreliable.sum() == unreliable


def test_order_and_shape_of_the_pixels_do_not_matter():
    values = torch.rand(2, 3, 16, 5, generator=torch.Generator().manual_seed(0))
    known, share = values > 0.1, torch.tensor(0.3)
    whole, turned = partition(values, known, share, World()), partition(values.mT, known.mT, share, World())
    assert torch.equal(whole.reliable, turned.reliable.mT)


def test_nothing_known_gives_empty_sets():
    values, known = torch.rand(2, 3, 3), torch.zeros(2, 3, 3, dtype=torch.bool)
    assert ops.threshold(values, known, torch.tensor(0.2), World()).isnan()
    parts = partition(values, known, torch.tensor(0.2), World())
    assert not parts.reliable.any()
    assert not parts.unreliable.any()


def test_a_pixel_without_an_entropy_is_in_neither_set():
    values = torch.tensor([0.0, 1.0, 2.0, torch.nan])
    parts = partition(values, torch.ones(4, dtype=torch.bool), torch.tensor(0.5), World())
    assert parts.reliable.tolist() == [True, False, False, False]
    assert parts.unreliable.tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_labels_are_kept_below_the_threshold(dtype):
    values = torch.tensor([0.0, 1.0, 2.0, torch.nan, 0.5])
    label = torch.tensor([3, 1, 2, 4, 255]).to(dtype)
    assert reliable_labels(values, label, torch.tensor(1.0)).tolist() == [3, 255, 255, 255, 255]
    assert reliable_labels(values, label, torch.tensor(torch.nan)).tolist() == [255] * 5
    assert reliable_labels(values, label, torch.tensor(1.0)).dtype == dtype
