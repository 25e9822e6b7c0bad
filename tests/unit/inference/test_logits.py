import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.inference.logits import averaged, combined, sliding, whole


class Pointwise(nn.Module):
    """Logits of a pixel are a function of that pixel alone; remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        assert image.dtype == torch.uint8
        self.shown.append(image)
        return torch.cat([image.float(), image[:, :1].float() ** 2 / 255], dim=1)


class Neighbours(nn.Module):
    """Logits at half the resolution, of all pixels in a square of 7: what lies in the same window matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Conv2d(3, 4, 7, 2, 3)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image.float() / 100)


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


def resized(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    return nn.functional.interpolate(maps, size, mode="bilinear", align_corners=True)


def slowly(network: nn.Module, image: Tensor, window: tuple[int, int] | None, scale: float) -> np.ndarray:
    """Probabilities of one image, [C,H,W]: the window walks in steps of two thirds, and its logits are added up."""
    sides = [max(1, round(side * scale)) for side in image.shape[2:]]
    small = nn.functional.interpolate(image.float(), sides, mode="bilinear", antialias=True).round().byte()
    if scale == 1:
        assert torch.equal(small, image)
    if window is None:
        return resized(network(small), tuple(image.shape[2:])).softmax(1)[0].numpy()
    height, width = window
    canvas = torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1)
    canvas = canvas.repeat(1, 1, max(height, sides[0]), max(width, sides[1]))
    canvas[..., : sides[0], : sides[1]] = small
    sums, counts = np.zeros((4, *canvas.shape[2:])), np.zeros(canvas.shape[2:])
    places = []
    for length, side in zip(canvas.shape[2:], (height, width), strict=True):
        starts, at = [], 0
        while at + side < length:
            starts.append(at)
            at += math.ceil(2 * side / 3)
        places.append([*starts, length - side])
    for top in places[0]:
        for left in places[1]:
            part = canvas[..., top : top + height, left : left + width]
            sums[:, top : top + height, left : left + width] += resized(network(part), (height, width))[0].numpy()
            counts[top : top + height, left : left + width] += 1
    logits = torch.from_numpy(sums / counts)[None, :, : sides[0], : sides[1]]
    return resized(logits, tuple(image.shape[2:])).softmax(1)[0].numpy()


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((33, 47), None), ((33, 47), (17, 23)), ((10, 50), (24, 24)), ((9, 13), (24, 31)), ((25, 24), (24, 24)),
        ((5, 7), (3, 3)), ((1, 11), (3, 3)),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((1.0,), True), ((0.5, 0.75, 1.7), True)])
def test_several_looks_are_those_of_an_obvious_loop(size, window, scales, flip):
    network, image = Neighbours(), _image(*size)
    looks = partial(sliding, network, window=window) if window else partial(whole, network)
    found = combined(looks, image, scales, mirror=flip)
    for one, logits in zip(image, found, strict=True):
        expected = []
        for scale in scales:
            expected.append(slowly(network, one[None], window, scale))
            if flip:
                expected.append(slowly(network, one[None].flip(3), window, scale)[..., ::-1])
        np.testing.assert_allclose(logits.softmax(0).numpy(), np.mean(expected, axis=0), atol=2e-5)


def test_a_single_look_gives_its_own_logits():
    image, looks = _image(33, 47), partial(whole, Neighbours())
    assert torch.equal(combined(looks, image, [1.0], mirror=False), whole(Neighbours(), image))
    averages = averaged(looks, image, [1.0, 0.5], mirror=False)
    assert torch.equal(combined(looks, image, [1.0, 0.5], mirror=False).argmax(1), averages.argmax(1))
