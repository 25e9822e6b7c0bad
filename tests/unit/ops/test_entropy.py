import pytest
import torch

from pipeline.datasets.prepared.dataset import IGNORE_INDEX
from pipeline.ops.entropy import IGNORE, entropy


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


def test_ignored_pixels_have_one_label():
    assert IGNORE == IGNORE_INDEX
