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


def cut_image(image: np.ndarray, window: Window, out: np.ndarray) -> None:
    """Fills `out` with the window of the image: antialiased bilinear, padding in the mean colour.

    Args:
        image: uint8 [H,W,3].
        window: from `draw_window`.
        out: uint8 [3,crop_h,crop_w], overwritten.
    """
    top, left, height, width = window.source
    t_top, t_left, t_h, t_w = window.target
    part = torch.from_numpy(image[top : top + height, left : left + width]).permute(2, 0, 1)
    if (height, width) != (t_h, t_w):
        resized = F.interpolate(part.unsqueeze(0), (t_h, t_w), mode="bilinear", antialias=True, align_corners=False)
        part = resized.squeeze(0)
    out[:] = MEAN_COLOUR[:, None, None]
    out[:, t_top : t_top + t_h, t_left : t_left + t_w] = part.numpy()
    if window.flip:
        out[:] = out[:, :, ::-1].copy()


def cut_mask(mask: np.ndarray, window: Window, out: np.ndarray) -> None:
    """As `cut_image`, by the nearest source pixel; padding is 255.

    Args:
        mask: uint8 [H,W].
        window: from `draw_window`.
        out: uint8 [crop_h,crop_w], overwritten.
    """
    top, left, height, width = window.source
    t_top, t_left, t_h, t_w = window.target
    rows = top + (np.arange(t_h) * 2 + 1) * height // (2 * t_h)
    columns = left + (np.arange(t_w) * 2 + 1) * width // (2 * t_w)
    out[:] = IGNORE
    out[t_top : t_top + t_h, t_left : t_left + t_w] = mask[rows[:, None], columns]
    if window.flip:
        out[:] = out[:, ::-1].copy()


def shown(window: Window, width: int) -> tuple[slice, slice]:
    """Rows and columns in which a view of `width` columns shows the image; the rest is padding."""
    t_top, t_left, t_h, t_w = window.target
    left = width - t_left - t_w if window.flip else t_left
    return slice(t_top, t_top + t_h), slice(left, left + t_w)


def valid_area(window: Window, shape: tuple[int, int]) -> np.ndarray:
    """Where the view shows the image: bool [crop_h,crop_w]."""
    valid = np.zeros(shape, bool)
    valid[shown(window, shape[1])] = True
    return valid
