"""The weak view: random resize, crop and flip, as one window of the source image."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.config import DataConfig
from pipeline.datasets.format import IGNORE_INDEX as IGNORE

MEAN_COLOUR = np.array([124, 116, 104], np.uint8)
"""Padding: ImageNet's mean, so it is about 0 after normalisation."""


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
    """How many times smaller (1, 2, 4 or 8) the source may be decoded and still have the view's resolution."""
    (_, _, height, width), (_, _, t_height, t_width) = window.source, window.target
    return next((n for n in (8, 4, 2) if height >= n * t_height and width >= n * t_width), 1)


def cut_image(part: np.ndarray, window: Window, out: np.ndarray) -> None:
    """Fills `out` with the window of the image: antialiased bilinear, padding in the mean colour.

    Args:
        part: uint8 [h,w,3], the pixels of `window.source` alone, or these resized already.
        window: from `draw_window`.
        out: uint8 [3,crop_h,crop_w], overwritten.
    """
    pixels = torch.from_numpy(part).permute(2, 0, 1)
    size = window.target[2:]
    if pixels.shape[1:] != size:
        resized = F.interpolate(pixels.unsqueeze(0), size, mode="bilinear", antialias=True, align_corners=False)
        pixels = resized.squeeze(0)
    rows, columns = shown(window, out.shape[2])
    if size != out.shape[1:]:
        out[:] = MEAN_COLOUR[:, None, None]
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
