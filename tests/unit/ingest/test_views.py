import numpy as np
import pytest

from pipeline.batch import PADDING_COLOUR
from pipeline.config.schema import DataConfig
from pipeline.ingest.augment import IGNORE, cut_image, cut_mask, draw_window, mark_shown, reduction
from pipeline.ingest.order import generator

PADDING = np.array(PADDING_COLOUR, np.uint8)
SIZES = [(60, 80), (31, 17), (64, 64), (200, 50)]


def _cut(config: DataConfig, image: np.ndarray, mask: np.ndarray, seed: int):
    height, width = mask.shape
    window = draw_window(height, width, config, generator("views", seed))
    out, labels = np.empty((3, *config.crop), np.uint8), np.empty(config.crop, np.uint8)
    valid = np.empty(config.crop, bool)
    top, left, rows, columns = window.source
    cut_image(image[top : top + rows, left : left + columns], window, out)
    cut_mask(mask, window, labels)
    mark_shown(window, valid)
    return window, out, labels, valid


def _ramps(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image whose red is the row and whose green is the column, and the same two as masks."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([y, x, np.zeros_like(y)], 2), y, x


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [(0.5, 2.0), (1.0, 1.0), (0.5, 0.5), (2.0, 2.0)])
def test_image_and_mask_show_the_same_place(size, scale):
    config = DataConfig(crop=(48, 40), scale=scale)
    image, rows, columns = _ramps(*size)
    for seed in range(12):
        window, out, _, valid = _cut(config, image, rows, seed)
        inner = np.zeros_like(valid)  # at the border the antialiasing filter is cut off
        top, left, height, width = window.target
        margin = 2
        inner[top + margin : top + height - margin, left + margin : left + width - margin] = True
        inner = inner[:, ::-1] if window.flip else inner
        for channel, truth in enumerate((rows, columns)):
            labels = np.empty(config.crop, np.uint8)
            cut_mask(truth, window, labels)
            difference = np.abs(out[channel].astype(int) - labels.astype(int))[inner & valid]
            ratio = max(window.source[2] / window.target[2], window.source[3] / window.target[3])
            assert difference.max(initial=0) <= 1 + ratio / 2


def test_unscaled_views_are_exact_copies():
    config = DataConfig(crop=(48, 40), scale=(1.0, 1.0), flip=False)
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 255, (60, 80, 3), np.uint8), rng.integers(0, 9, (60, 80), np.uint8)
    places = set()
    for seed in range(20):
        window, out, labels, valid = _cut(config, image, mask, seed)
        top, left, height, width = window.source
        assert (height, width) == (48, 40)
        assert np.array_equal(out, image[top : top + 48, left : left + 40].transpose(2, 0, 1))
        assert np.array_equal(labels, mask[top : top + 48, left : left + 40])
        assert valid.all()
        places.add((top, left))
    assert len(places) > 15


@pytest.mark.parametrize("size", SIZES)
def test_padding_is_mean_colour_ignored_and_invalid(size):
    config = DataConfig(crop=(64, 64), scale=(0.4, 0.9))
    height, width = size
    image, mask = np.full((height, width, 3), 255, np.uint8), np.full((height, width), 3, np.uint8)
    for seed in range(20):
        window, out, labels, valid = _cut(config, image, mask, seed)
        assert np.array_equal(valid, labels != IGNORE)
        assert (labels[valid] == 3).all()
        assert (out[:, valid] == 255).all()
        assert (out[:, ~valid] == PADDING[:, None]).all()
        assert valid.sum() == window.target[2] * window.target[3]


def test_flip_mirrors_everything():
    image, rows, columns = _ramps(60, 80)
    plain, flipped = DataConfig(crop=(48, 90), scale=(1, 1), flip=False), DataConfig(crop=(48, 90), scale=(1, 1))
    seen = set()
    for seed in range(30):
        _, out, labels, valid = _cut(plain, image, columns, seed)
        window, *mine = _cut(flipped, image, columns, seed)
        assert window.source == _cut(plain, image, rows, seed)[0].source
        expected = (out[..., ::-1], labels[:, ::-1], valid[:, ::-1]) if window.flip else (out, labels, valid)
        for one, two in zip(mine, expected, strict=True):
            assert np.array_equal(one, two)
        seen.add(window.flip)
    assert seen == {True, False}


def test_windows_stay_inside_and_scales_fill_the_range():
    config = DataConfig(crop=(50, 50), scale=(0.5, 2.0))
    ratios = []
    for seed in range(400):
        window = draw_window(60, 80, config, generator(seed))
        for (start, length), limit in zip(
            [window.source[::2], window.source[1::2], window.target[::2], window.target[1::2]],
            [60, 80, 50, 50], strict=True,
        ):  # fmt: skip
            assert start >= 0
            assert length >= 1
            assert start + length <= limit
        ratios.append(window.target[2] / window.source[2])
    assert min(ratios) < 0.55
    assert max(ratios) > 1.9
    assert 0.4 < np.mean(np.array(ratios) < 1.25) < 0.6  # uniform


def test_one_pixel_images():
    _, _, labels, valid = _cut(
        DataConfig(crop=(8, 8), scale=(0.5, 2.0)), np.full((1, 1, 3), 9, np.uint8), np.full((1, 1), 2, np.uint8), 0
    )
    assert valid.sum() >= 1
    assert (labels[valid] == 2).all()


def test_a_reduced_source_has_the_views_resolution():
    config = DataConfig(crop=(50, 50), scale=(0.05, 1.2))
    factors = set()
    for seed in range(600):
        height, width = generator("size", seed).integers(50, 700, 2).tolist()
        window = draw_window(height, width, config, generator(seed))
        factor = reduction(window)
        factors.add(factor)
        ratio = min(window.source[2] / window.target[2], window.source[3] / window.target[3])
        assert ratio >= factor or factor == 1
        assert ratio < 2 * factor or factor == 8
    assert factors == {1, 2, 4, 8}
