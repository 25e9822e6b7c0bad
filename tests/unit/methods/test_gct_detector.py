import pytest
import torch
from torch import nn

from pipeline.methods.gct import FlawDetector, HalfInstanceNorm

CLASSES = 5


@pytest.mark.parametrize("size", [(24, 24), (64, 64), (65, 97)])
def test_the_detector_gives_a_map_of_the_size_of_the_image(size):
    detector = FlawDetector(3 + CLASSES, 4)
    assert detector(torch.rand(2, 3, *size), torch.rand(2, CLASSES, *size)).shape == (2, 1, *size)
    convolutions = [m for m in detector.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [4, 8, 8, 16, 16, 32, 32, 1]
    assert [m.stride[0] for m in convolutions] == [2, 2, 1, 2, 1, 2, 1, 2]


def test_half_of_the_channels_have_batch_norm():
    x = torch.randn(3, 6, 5, 5) * 4 + 2
    out = HalfInstanceNorm(6)(x)
    torch.testing.assert_close(out[:, :3].mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(out[:, 3:].mean((2, 3)), torch.zeros(3, 3), rtol=0, atol=1e-5)
    assert out[:, :3].mean((2, 3)).abs().max() > 0.01
