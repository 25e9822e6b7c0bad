import pytest
import torch
from torch import Tensor, nn

from pipeline.inference.predict import sliding, whole


class Pointwise(nn.Module):
    """Logits of a pixel are a function of that pixel alone; remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        assert image.dtype == torch.uint8
        self.shown.append(image)
        return torch.cat([image.float(), image[:, :1].float() ** 2 / 255], dim=1)


class Half(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image[..., ::2, ::2].bfloat16()


def _image(height: int, width: int, batch: int = 2) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("size", [(40, 70), (24, 24), (25, 24), (10, 50), (50, 10), (5, 6), (95, 31)])
@pytest.mark.parametrize("window", [(24, 24), (17, 33)])
def test_sliding_equals_whole_where_neighbours_do_not_matter(size, window):
    image = _image(*size)
    torch.testing.assert_close(sliding(Pointwise(), image, window), whole(Pointwise(), image))


def test_cityscapes_has_the_windows_of_the_release():
    model = Pointwise()
    rows, columns = torch.arange(1024).view(-1, 1) // 8, torch.arange(2048) // 8
    image = torch.stack([rows.expand(1024, 2048), columns.expand(1024, 2048), rows + columns]).byte()
    sliding(model, image.unsqueeze(0), (769, 769))
    assert [tuple(shown.shape[2:]) for shown in model.shown] == [(769, 769)] * 8
    corners = [tuple(shown[0, :2, 0, 0].tolist()) for shown in model.shown]
    assert corners == [(top // 8, left // 8) for top in (0, 255) for left in (0, 513, 1026, 1279)]


def test_padding_is_the_mean_colour_and_is_not_returned():
    model = Pointwise()
    image = torch.zeros(1, 3, 4, 5, dtype=torch.uint8)
    assert sliding(model, image, (8, 8)).shape == (1, 4, 4, 5)
    (shown,) = model.shown
    assert shown.shape == (1, 3, 8, 8)
    assert (shown[..., :4, :5] == 0).all()
    assert shown[0, :, 7, 0].tolist() == shown[0, :, 0, 7].tolist() == [124, 116, 104]
    assert not image.any()


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_scale_resizes_for_the_network_only(scale):
    model = Pointwise()
    assert whole(model, _image(33, 47), scale).shape == (2, 4, 33, 47)
    assert model.shown[0].shape[2:] == (round(33 * scale), round(47 * scale))
    model.shown.clear()
    assert sliding(model, _image(33, 47), (16, 16), scale).shape == (2, 4, 33, 47)
    assert {tuple(shown.shape[2:]) for shown in model.shown} == {(16, 16)}


def test_logits_come_back_at_native_size_in_float32():
    logits = whole(Half(), _image(33, 47))
    assert logits.shape == (2, 3, 33, 47)
    assert logits.dtype == sliding(Half(), _image(33, 47), (16, 16)).dtype == torch.float32
