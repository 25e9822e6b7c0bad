"""One sample to its training views: window, decoding, crop, resize, flip, and strong views in other colours.

A pure function of bytes, id, epoch and seed: neither the number of workers nor the place where it runs changes a view.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from pipeline.batch import PADDING_COLOUR, Views
from pipeline.config.schema import DataConfig
from pipeline.datasets.images import (
    DecodeError,
    bands_of,
    decode_mask,
    decode_part,
    decode_reduced,
    read_header,
    reduce,
    size_of,
)
from pipeline.datasets.prepared.dataset import IGNORE_INDEX as IGNORE
from pipeline.ingest import transform
from pipeline.ingest.order import generator
from pipeline.ingest.read import Sample

# ---- where a view lies ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Which part of the source fills which part of the view."""

    source: tuple[int, int, int, int]
    """top, left, height, width in the source, pixels."""
    target: tuple[int, int, int, int]
    """top, left, height, width in the view, pixels; the rest is padding."""
    flip: bool


def draw_window(height: int, width: int, config: DataConfig, rng: np.random.Generator) -> Window:
    """A random window: the scale is uniform, and so is the place of the crop (or of a smaller image in it)."""
    scale = rng.uniform(*config.scale)
    top, left, flip = rng.random(), rng.random(), config.flip and rng.random() < 0.5
    axes = [_axis(*axis, scale) for axis in ((height, config.crop[0], top), (width, config.crop[1], left))]
    (s_top, s_h, t_top, t_h), (s_left, s_w, t_left, t_w) = axes
    return Window((s_top, s_left, s_h, s_w), (t_top, t_left, t_h, t_w), bool(flip))


def _axis(size: int, crop: int, place: float, scale: float) -> tuple[int, int, int, int]:
    """Start and length in the source and in the view, along one axis."""
    scaled = max(1, round(size * scale))
    if scaled <= crop:
        return 0, size, int(place * (crop - scaled + 1)), scaled
    length = min(size, max(1, round(crop / scale)))
    return int(place * (size - length + 1)), length, 0, crop


def reduction(window: Window) -> int:
    """The factor (1, 2, 4 or 8) by which decoding may shrink the source without loss of resolution in the view."""
    (_, _, height, width), (_, _, t_height, t_width) = window.source, window.target
    return next((n for n in (8, 4, 2) if height >= n * t_height and width >= n * t_width), 1)


def cut_image(part: np.ndarray, window: Window, out: np.ndarray, padding: Sequence[int] = PADDING_COLOUR) -> None:
    """Fills `out` with the window of the image: antialiased bilinear, padding in the mean colour.

    Args:
        part: uint8 [h,w,3] or of other bands, the pixels of `window.source` alone, or these resized already.
        window: from `draw_window`.
        out: uint8 [3,crop_h,crop_w], or of as many bands, overwritten.
        padding: value of padding in each band.
    """
    pixels = torch.from_numpy(part).permute(2, 0, 1)
    size = window.target[2:]
    if pixels.shape[1:] != size:
        resized = F.interpolate(pixels.unsqueeze(0), size, mode="bilinear", antialias=True, align_corners=False)
        pixels = resized.squeeze(0)
    rows, columns = shown(window, out.shape[2])
    if size != out.shape[1:]:
        out[:] = np.array(padding, np.uint8)[:, None, None]
    out[:, rows, columns] = pixels.numpy()[:, :, ::-1] if window.flip else pixels.numpy()


def cut_mask(mask: np.ndarray, window: Window, out: np.ndarray) -> None:
    """As `cut_image`, of the whole mask, by the nearest source pixel; padding is 255.

    Args:
        mask: uint8 [H,W].
        window: from `draw_window`.
        out: [crop_h,crop_w] of an integer type, overwritten.
    """
    top, left, height, width = window.source
    t_h, t_w = window.target[2:]
    rows = top + (np.arange(t_h) * 2 + 1) * height // (2 * t_h)
    columns = left + (np.arange(t_w) * 2 + 1) * width // (2 * t_w)
    if (t_h, t_w) != out.shape:
        out[:] = IGNORE
    labels = mask[rows[:, None], columns]
    out[shown(window, out.shape[1])] = labels[:, ::-1] if window.flip else labels


def shown(window: Window, width: int) -> tuple[slice, slice]:
    """Rows and columns in which a view of `width` columns shows the image; the rest is padding."""
    t_top, t_left, t_h, t_w = window.target
    left = width - t_left - t_w if window.flip else t_left
    return slice(t_top, t_top + t_h), slice(left, left + t_w)


def mark_shown(window: Window, out: np.ndarray) -> None:
    """Where the view shows the image: `out`, bool [crop_h,crop_w], is overwritten."""
    out[:] = False
    out[shown(window, out.shape[1])] = True


JITTER = 0.8
"""Probability of a change of brightness, contrast, saturation and hue."""
SIGMA = (0.1, 2.0)
"""Range of the blur's standard deviation, pixels."""


# ---- strong views -----------------------------------------------------------------------------------------------


def fill_strong(
    image: np.ndarray,
    area: tuple[slice, slice],
    config: DataConfig,
    drawn: Callable[[], np.random.Generator],
    out: np.ndarray,
    *,
    rgb: bool = True,
) -> None:
    """Makes one strong view; padding keeps its colour and takes no part (the contrast's mean, the blur).

    Args:
        image: uint8 [3,H,W] or of other bands, the weak view.
        area: rows and columns of it that show the image.
        config: how much it changes: `strength`, `hue`, `grey`, `blur`.
        drawn: a generator that decides everything, the same with each call.
        out: as `image`, overwritten.
        rgb: whether the bands are a colour. Of others each changes by itself, and all alike: brightness, contrast and
            blur, as saturation, hue and grey are of colours.
    """
    if not rgb:
        out[:] = image
        for band, changed in zip(image, out, strict=True):
            changed[area] = np.asarray(_changed(Image.fromarray(band[area].copy()), config, drawn()))
        return
    rng = drawn()
    picture = Image.fromarray(np.ascontiguousarray(image[:, area[0], area[1]].transpose(1, 2, 0)))
    out[:] = image
    out[:, area[0], area[1]] = np.asarray(_changed(picture, config, rng)).transpose(2, 0, 1)


def _changed(picture: Image.Image, config: DataConfig, rng: np.random.Generator) -> Image.Image:
    jitter, grey, blur = rng.random(3) < (JITTER, config.grey, config.blur)
    if jitter:
        picture = _jittered(picture, config, rng)
    if grey and picture.mode == "RGB":
        picture = picture.convert("L").convert("RGB")
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*SIGMA)))
    return picture


def _jittered(picture: Image.Image, config: DataConfig, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue, changed in random order; the last two leave grey as it is."""
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


Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Allocates a tensor of a shape and dtype, with arbitrary content."""


# ---- one sample -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewRecipe:
    """The settings that all views of a run share."""

    data: DataConfig
    """Crop, scale, flip, hue."""
    seed: int
    strong: int
    """How many strong views an unlabeled sample gets."""
    bands: int = 0
    """Of images that are no RGB; 0: they are."""
    padding: tuple[int, ...] = PADDING_COLOUR
    """Value of padding in each band."""

    @property
    def channels(self) -> int:
        """Of every view."""
        return self.bands or 3


class Outcome(NamedTuple):
    """Whether a sample could be decoded, and what it cost."""

    seconds: float
    """CPU time of the thread that decoded it."""
    problem: str
    """Why it could not be decoded; empty if it could."""


def empty_views(samples: Sequence[Sample], recipe: ViewRecipe, allocate: Allocate) -> Views:
    """Memory for the views of `samples`. All of them have a mask, all have a label, or all have neither."""
    count, (height, width) = len(samples), recipe.data.crop
    labeled = samples[0].mask is not None

    def images() -> Tensor:
        return allocate((count, recipe.channels, height, width), torch.uint8)

    def classes(encoded: memoryview | bytes | None) -> Tensor | None:
        return None if encoded is None else allocate((count, height, width), torch.int64)

    return Views(
        images(),
        classes(samples[0].mask),
        allocate((count, height, width), torch.bool),
        tuple(sample.id for sample in samples),
        () if labeled else tuple(images() for _ in range(recipe.strong)),
        classes(samples[0].label),
    )


def view_bytes(recipe: ViewRecipe, *, classes: bool, strong: int = 0) -> int:
    """Memory that one sample takes with or without a mask or pseudo-label, and with some strong views."""
    pixel = recipe.channels + 1 + 8 * classes + recipe.channels * strong
    return pixel * recipe.data.crop[0] * recipe.data.crop[1]


def fill(sample: Sample, recipe: ViewRecipe, views: Views, place: int) -> Outcome:
    """Decodes one sample into row `place` of the views. No pixel of a damaged sample is valid.

    Raises:
        UserError: the transform of the user's own fails.
    """
    began = time.thread_time()
    image, valid = views.image[place].numpy(), views.valid[place].numpy()
    masks = [each[place].numpy() for each in (views.mask, views.pseudo) if each is not None]
    strong = [view[place].numpy() for view in views.strong]
    problem = ""
    try:
        window = _fill_weak(sample, recipe, image, masks)
        mark_shown(window, valid)
        if recipe.data.transform:
            rng = generator(recipe.seed, sample.epoch, sample.id, "transform")
            transform.apply(recipe.data.transform, image, masks, valid, rng, sample.id)
        area = shown(window, recipe.data.crop[1])
        for number, view in enumerate(strong):
            drawn = partial(generator, recipe.seed, sample.epoch, sample.id, "strong", number)
            fill_strong(image, area, recipe.data, drawn, view, rgb=not recipe.bands)
    except DecodeError as error:
        problem = str(error)
        valid[:] = False
        for view in (image, *strong):
            view[:] = np.array(recipe.padding, np.uint8)[:, None, None]
        for mask in masks:
            mask[:] = IGNORE
    return Outcome(time.thread_time() - began, problem)


def _fill_weak(sample: Sample, recipe: ViewRecipe, image: np.ndarray, masks: Sequence[np.ndarray]) -> Window:
    """Draws the window for the stored size, then decodes no more pixels than it needs."""
    picture = read_header(sample.image)
    if bands_of(picture) != recipe.bands:
        raise DecodeError(f"has {bands_of(picture) or 'no'} bands, the dataset {recipe.bands or 'RGB'}")
    height, width = size_of(picture)
    rng = generator(recipe.seed, sample.epoch, sample.id, "unlabeled" if sample.mask is None else "labeled")
    window = draw_window(height, width, recipe.data, rng)
    factor = reduce(picture, reduction(window))  # 1 of images of bands, which are PNG files
    if factor == 1:
        part = decode_part(picture, window.source)
    else:
        part = decode_reduced(picture, window.source, factor, window.target[2:])
    cut_image(part, window, image, recipe.padding)
    encoded = [each for each in (sample.mask, sample.label) if each is not None]
    for each, mask in zip(encoded, masks, strict=True):
        classes = decode_mask(each)
        if classes.shape != (height, width):
            raise DecodeError("image and mask have different sizes")
        cut_mask(classes, window, mask)
    return window
