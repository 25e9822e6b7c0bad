"""The partition of the unlabeled pixels by the quantiles of their entropy, and L_u fast and plain."""

import pytest
import torch
from torch import Tensor

from pipeline.methods.u2pl import fast, reference
from pipeline.methods.u2pl.fast import reliable_labels
from pipeline.methods.u2pl.reference import Reliability
from pipeline.ops.entropy import masked_quantile
from pipeline.ops.world import World
from tests.unit.methods.u2pl.scenes import split
from tests.unit.ops.worlds import on_ranks


def partition(values: Tensor, known: Tensor, alpha: Tensor, world: World) -> Reliability:
    return split(values, known, masked_quantile(values, known, (1.0 - alpha).view(1), world))


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
    assert values[alone.unreliable].min() >= alone.thresholds[0] > values[alone.reliable].max()
    parts = on_ranks(2, lambda w: partition(values[2 * w.rank :][:2], known[2 * w.rank :][:2], share, w))
    assert torch.equal(torch.cat([part.reliable for part in parts]), alone.reliable)
    assert torch.equal(torch.cat([part.unreliable for part in parts]), alone.unreliable)


def test_a_pixel_at_the_threshold_is_unreliable():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    parts = partition(values, values >= 0, torch.tensor(0.5), World())
    assert parts.thresholds[0] == 2
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


def test_the_surest_need_a_threshold_of_their_own():
    values = torch.rand(1, 3, 3)
    with pytest.raises(ValueError, match="second threshold"):
        _ = partition(values, values >= 0, torch.tensor(0.2), World()).surest


def test_nothing_known_gives_empty_sets():
    values, known = torch.rand(2, 3, 3), torch.zeros(2, 3, 3, dtype=torch.bool)
    parts = partition(values, known, torch.tensor(0.2), World())
    assert parts.thresholds[0].isnan()
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


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("known", [0.8, 0.0])
def test_fast_and_plain_agree(known, ranks):
    """With padding, unlabeled pixels and logits coarser than labels."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 5, 5) * 2, torch.randn(2, 4, 5, 5) * 2
    label = torch.where(torch.rand(2, 17, 17) < known, torch.randint(0, 4, (2, 17, 17)), 255)
    shown, shares = (label != 255) | (torch.rand(2, 17, 17) < 0.1), torch.tensor([0.8, 0.2])

    def run(parts, world: World) -> tuple[Reliability, Tensor]:
        own = slice(world.rank, world.rank + 1) if ranks == 2 else slice(None)
        logits = student[own].clone().requires_grad_()
        found = parts.unsupervised(logits, teacher[own], label[own], shown[own], shares, world, world)
        found.loss.backward()
        assert logits.grad is not None
        return found._replace(loss=found.loss.detach()), logits.grad

    pairs = [on_ranks(ranks, lambda world, parts=parts: run(parts, world)) for parts in (fast, reference)]
    for (one, gradient), (two, expected) in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(one.thresholds, two.thresholds, rtol=0, atol=1e-6, equal_nan=True)
        for name in ("loss", "kept_share", "entropy"):
            torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-5, atol=1e-6)
        for name in ("label", "known", "reliable", "unreliable", "surest"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name
