"""The strong view: the weak view in other colours, without colour, or blurred.

The recipe of ST++, FixMatch and UniMatch for segmentation (LiheYoung/UniMatch, dataset/semi.py). On Pillow images,
whose 8-bit operations are two to three times as fast on a CPU as those on tensors.
"""

import numpy as np
from PIL import Image, ImageFilter

from pipeline.config import DataConfig

JITTER = 0.8
"""Probability of a change of brightness, contrast, saturation and hue."""
SIGMA = (0.1, 2.0)
"""Range of the blur's standard deviation, pixels."""


def fill_strong(
    image: np.ndarray, area: tuple[slice, slice], config: DataConfig, rng: np.random.Generator, out: np.ndarray
) -> None:
    """Makes one strong view; padding keeps its colour and takes no part (the contrast's mean, the blur).

    Args:
        image: uint8 [3,H,W], the weak view.
        area: rows and columns of it that show the image.
        config: how much it changes: `strength`, `hue`, `grey`, `blur`.
        rng: decides everything.
        out: uint8 [3,H,W], overwritten.
    """
    picture = Image.fromarray(np.ascontiguousarray(image[:, area[0], area[1]].transpose(1, 2, 0)))
    out[:] = image
    out[:, area[0], area[1]] = np.asarray(_changed(picture, config, rng)).transpose(2, 0, 1)


def _changed(picture: Image.Image, config: DataConfig, rng: np.random.Generator) -> Image.Image:
    jitter, grey, blur = rng.random(3) < (JITTER, config.grey, config.blur)
    if jitter:
        picture = _jittered(picture, config, rng)
    if grey:
        picture = picture.convert("L").convert("RGB")
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*SIGMA)))
    return picture


def _jittered(picture: Image.Image, config: DataConfig, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue, changed in random order."""
    from torchvision.transforms.v2 import functional as F  # slow to import, and few methods have strong views

    brightness, contrast, saturation = rng.uniform(1 - config.strength, 1 + config.strength, 3)
    turn = rng.uniform(-config.hue, config.hue)
    changes = (
        lambda seen: F.adjust_brightness(seen, brightness),
        lambda seen: F.adjust_contrast(seen, contrast),
        lambda seen: F.adjust_saturation(seen, saturation),
        lambda seen: F.adjust_hue(seen, turn),
    )
    for number in rng.permutation(len(changes)):
        picture = changes[number](picture)
    return picture
