"""The strong view: the weak view in other colours, without colour, or blurred.

The recipe of ST++, FixMatch and UniMatch for segmentation (LiheYoung/UniMatch, dataset/semi.py). On Pillow images,
whose 8-bit operations are two to three times as fast on a CPU as those on tensors.
"""

import numpy as np
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as F

JITTER, GREY, BLUR = 0.8, 0.2, 0.5
"""Probabilities of the three changes."""
STRENGTH = 0.5
"""Brightness, contrast and saturation change by up to +-STRENGTH of themselves."""
SIGMA = (0.1, 2.0)
"""Range of the blur's standard deviation, pixels."""


def fill_strong(
    image: np.ndarray, area: tuple[slice, slice], hue: float, rng: np.random.Generator, out: np.ndarray
) -> None:
    """Makes one strong view; padding keeps its colour and takes no part (the contrast's mean, the blur).

    Args:
        image: uint8 [3,H,W], the weak view.
        area: rows and columns of it that show the image.
        hue: the hue changes by up to +-hue of the colour circle (release: 0.25).
        rng: decides everything.
        out: uint8 [3,H,W], overwritten.
    """
    picture = Image.fromarray(np.ascontiguousarray(image[:, area[0], area[1]].transpose(1, 2, 0)))
    out[:] = image
    out[:, area[0], area[1]] = np.asarray(_changed(picture, hue, rng)).transpose(2, 0, 1)


def _changed(picture: Image.Image, hue: float, rng: np.random.Generator) -> Image.Image:
    jitter, grey, blur = rng.random(3) < (JITTER, GREY, BLUR)
    if jitter:
        picture = _jittered(picture, hue, rng)
    if grey:
        picture = picture.convert("L").convert("RGB")
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*SIGMA)))
    return picture


def _jittered(picture: Image.Image, hue: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue, changed in random order."""
    brightness, contrast, saturation = rng.uniform(1 - STRENGTH, 1 + STRENGTH, 3)
    turn = rng.uniform(-hue, hue)
    changes = (
        lambda seen: F.adjust_brightness(seen, brightness),
        lambda seen: F.adjust_contrast(seen, contrast),
        lambda seen: F.adjust_saturation(seen, saturation),
        lambda seen: F.adjust_hue(seen, turn),
    )
    for number in rng.permutation(len(changes)):
        picture = changes[number](picture)
    return picture
