from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as F

from pipeline.batch import PADDING_COLOUR
from pipeline.config.schema import DataConfig
from pipeline.ingest import augment
from pipeline.ingest.augment import fill_strong
from pipeline.ingest.order import generator

PADDING = np.array(PADDING_COLOUR, np.uint8)
AREA = (slice(4, 30), slice(7, 40))
INSIDE = (slice(None), *AREA)


def _image() -> np.ndarray:
    """A smooth picture in `AREA`, padding around it."""
    small = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((33, 26), Image.Resampling.BICUBIC)
    image = np.empty((3, 36, 44), np.uint8)
    image[:] = PADDING[:, None, None]
    image[INSIDE] = np.asarray(picture).transpose(2, 0, 1)
    return image


def _strong(seed: int, image: np.ndarray | None = None, **options: float) -> np.ndarray:
    image = _image() if image is None else image
    out = np.empty_like(image)
    fill_strong(image, AREA, DataConfig(**options), partial(generator, "photometric", seed), out)  # type: ignore[arg-type]
    return out


def test_it_is_a_function_of_the_generator():
    views = [_strong(seed) for seed in range(30)]
    assert all(np.array_equal(_strong(seed), view) for seed, view in enumerate(views))
    changed = [view.tobytes() for view in views if not np.array_equal(view, _image())]
    assert len(changed) > 20
    assert len(set(changed)) == len(changed)


def test_padding_keeps_its_colour_and_the_weak_view_is_left_alone():
    image = _image()
    padding = np.ones(image.shape[1:], bool)
    padding[AREA] = False
    for seed in range(30):
        assert (_strong(seed, image)[:, padding] == PADDING[:, None]).all()
    assert np.array_equal(image, _image())


def test_padding_does_not_reach_the_picture():
    """Neither through the blur at its border nor through the mean grey of the contrast."""
    black = _image()
    black[:, :4] = black[:, 30:] = 0
    for seed in range(30):
        assert np.array_equal(_strong(seed, black)[INSIDE], _strong(seed)[INSIDE])


def test_geometry_is_kept():
    """Edges stay where they are: a picture of two halves, seen without blur."""
    image = np.full((3, 36, 44), 60, np.uint8)
    image[0, :, 22:] = 200
    for seed in range(30):
        view = _strong(seed, image, blur=0.0)[INSIDE].astype(int)
        assert (view[:, :, :15] == view[:, :1, :1]).all()
        assert (view[:, :, 15:] == view[:, :1, -1:]).all()
        assert (view[:, 0, 0] != view[:, 0, -1]).any()


@pytest.mark.parametrize("which", ["jitter", "grey", "blur"])
def test_each_change_alone_is_what_it_says(which, monkeypatch):
    monkeypatch.setattr(augment, "JITTER", float(which == "jitter"))
    options: Any = {name: float(name == which) for name in ("grey", "blur")} | {"strength": 0.3, "hue": 0.1}
    picture = Image.fromarray(np.ascontiguousarray(_image()[INSIDE].transpose(1, 2, 0)))
    different = 0
    for seed in range(5):
        rng = generator("photometric", seed)
        rng.random(3)
        expected: Any = picture
        if which == "jitter":
            factors = [*rng.uniform(0.7, 1.3, 3), rng.uniform(-0.1, 0.1)]
            for number in rng.permutation(4):
                change = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[number]
                expected = change(expected, factors[number])
        elif which == "grey":
            expected = Image.merge("RGB", [picture.convert("L")] * 3)
        else:
            expected = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
        assert np.array_equal(_strong(seed, **options)[INSIDE], np.asarray(expected).transpose(2, 0, 1))
        different += expected.tobytes() != picture.tobytes()
    assert different > 2  # the least blur changes nothing


def test_the_hue_turns_as_far_as_asked(monkeypatch):
    monkeypatch.setattr(augment, "JITTER", 1.0)
    red = np.zeros((3, 36, 44), np.uint8)
    red[0] = 200
    for hue in (0.0, 0.02, 0.25):
        made = (_strong(seed, red, hue=hue, strength=0.0, grey=0.0, blur=0.0) for seed in range(40))
        views = [Image.fromarray(view[INSIDE].transpose(1, 2, 0)) for view in made]
        turned = [np.asarray(view.convert("HSV"))[0, 0, 0].astype(np.int8) / 256 for view in views]
        assert 0.8 * hue <= max(turned) + 1 / 256
        assert max(map(abs, turned)) <= hue + 1 / 256


def test_how_often_each_change_is_drawn(monkeypatch):
    seen = dict.fromkeys(("jitter", "grey", "blur"), 0)

    def counted(name):
        def count(picture, *rest):
            seen[name] += 1
            return picture

        return count

    monkeypatch.setattr(augment, "_jittered", counted("jitter"))
    monkeypatch.setattr(Image.Image, "convert", counted("grey"))
    monkeypatch.setattr(Image.Image, "filter", counted("blur"))
    for seed in range(300):
        _strong(seed)
    assert seen["jitter"] / 300 == pytest.approx(0.8, abs=0.07)
    assert seen["grey"] / 2 / 300 == pytest.approx(0.2, abs=0.07)
    assert seen["blur"] / 300 == pytest.approx(0.5, abs=0.09)


@pytest.mark.parametrize("area", [(slice(3, 4), slice(5, 6)), (slice(0, 36), slice(0, 1))])
def test_a_sliver_of_a_picture_is_no_trouble(area):
    for seed in range(20):
        fill_strong(_image(), area, DataConfig(), partial(generator, seed), np.empty((3, 36, 44), np.uint8))


def test_bands_that_are_no_colour_change_alike_in_brightness_contrast_and_blur_alone():
    """Each band as a grey picture of it would, in which hue, saturation and the loss of colour change nothing."""
    five = np.stack([_image()[at % 3] // (1 + at // 3) for at in range(5)])
    for seed in range(20):
        out = np.empty_like(five)
        fill_strong(five, AREA, DataConfig(), partial(generator, seed), out, rgb=False)
        for band, changed in zip(five, out, strict=True):
            grey = np.repeat(band[None], 3, 0)
            alone = np.empty_like(grey)
            fill_strong(grey, AREA, DataConfig(grey=0), partial(generator, seed), alone)
            assert np.abs(alone[0].astype(int) - changed).max() <= 2  # the conversions of hue and saturation round
