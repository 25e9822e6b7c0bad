import pytest
import torch

from pipeline.ops.entropy import entropy, partition, shrink
from pipeline.ops.world import World
from tests.unit.ops.worlds import on_ranks


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1000.0])
def test_entropy(scale):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, 6) * scale + 100
    expected = torch.distributions.Categorical(logits=logits.double().movedim(1, -1)).entropy()
    found = entropy(logits)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (found >= 0).all()


@pytest.mark.parametrize("alpha", [0.2, 0.05])
def test_the_share_alpha_is_unreliable_over_all_ranks(alpha):
    torch.manual_seed(0)
    values, label = torch.rand(4, 20, 20), torch.randint(0, 3, (4, 20, 20))
    label[3, :15] = 255
    share = torch.tensor(alpha)
    alone = partition(values, label, share, World())
    known = label != 255
    assert torch.equal(alone.reliable | alone.unreliable, known)
    assert not (alone.reliable & alone.unreliable).any()
    assert float(alone.unreliable.sum() / known.sum()) == pytest.approx(alpha, abs=1e-3)
    assert values[alone.unreliable].min() >= alone.threshold > values[alone.reliable].max()
    parts = on_ranks(2, lambda w: partition(values[2 * w.rank :][:2], label[2 * w.rank :][:2], share, w))
    assert torch.equal(torch.cat([part.reliable for part in parts]), alone.reliable)


def test_all_ignored_gives_empty_sets():
    parts = partition(torch.rand(2, 3, 3), torch.full((2, 3, 3), 255), torch.tensor(0.2), World())
    assert parts.threshold.isnan()
    assert not parts.reliable.any()
    assert not parts.unreliable.any()


def test_shrink_takes_the_source_index_rounded_down():
    values = torch.arange(33 * 10).view(1, 33, 10)
    small = shrink(values, (9, 4))
    for y in range(9):
        for x in range(4):
            assert small[0, y, x] == values[0, y * 33 // 9, x * 10 // 4]
