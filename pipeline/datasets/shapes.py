"""The demo dataset: coloured, textured shapes before a smooth background, generated without any download.

Every class has its own hue and its own texture, so a small network from scratch learns it from few labels,
and the unlabeled images have something to add; with weaker cues semi-supervised training has nothing to
amplify.
"""

import colorsys
import math

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pipeline import storage
from pipeline.datasets import shards
from pipeline.datasets.facts import KNOWN
from pipeline.datasets.format import INFO_FILE, DatasetInfo, open_dataset
from pipeline.datasets.images import encode_png

SIZE = 64
TRAIN, VAL = 400, 150
HUE_STD = 0.05
"""Of the colour circle; the five hues lie 0.2 apart."""
NOISE_STD = 10.0
"""Grey levels."""

Grid = NDArray[np.float64]


def render(seed: int, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draws one sample, a pure function of the arguments.

    Returns:
        The image [64,64,3] and the mask [64,64] of class ids 0 (background) to 5.
    """
    rng = np.random.default_rng([seed, index])
    image = _background(rng)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(rng.integers(2, 6)):
        kind = int(rng.integers(1, 6))
        inside, shade = _draw(rng, kind)
        image[inside] = _color(rng, kind) * shade[inside, None]
        mask[inside] = kind
    image += rng.normal(0.0, NOISE_STD, image.shape)
    return image.clip(0, 255).astype(np.uint8), mask


def _background(rng: Generator) -> Grid:
    """A colour field [64,64,3]: random colours on a coarse grid, blended smoothly."""
    knots = rng.uniform(40, 215, (4, 4, 3))
    position = np.linspace(0, 3, SIZE)
    distance = np.abs(position[:, None] - np.arange(4)).clip(0, 1)
    weight = 0.5 + 0.5 * np.cos(math.pi * distance)
    return np.einsum("yi,xj,ijc->yxc", weight, weight, knots)


def _color(rng: Generator, kind: int) -> Grid:
    hue = (kind - 1) / 5 + rng.normal(0.0, HUE_STD)
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.45, 0.85), rng.uniform(0.5, 1.0)))


def _draw(rng: Generator, kind: int) -> tuple[NDArray[np.bool_], Grid]:
    """Places one object: which pixels it covers [64,64] and how bright its texture is there [64,64]."""
    center, radius, angle = (
        rng.uniform(0.1 * SIZE, 0.9 * SIZE, 2),
        rng.uniform(6, 14),
        rng.uniform(0, 2 * math.pi),
    )
    y, x = np.mgrid[:SIZE, :SIZE] - center[:, None, None]
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return _covers(kind, u / radius, v / radius), np.where(_texture(kind, u, v), 1.0, 0.7)


def _covers(kind: int, u: Grid, v: Grid) -> NDArray[np.bool_]:
    """Disk, square, triangle, cross or ring of radius 1 around the origin."""
    if kind == 1:
        return np.hypot(u, v) <= 0.9
    if kind == 2:
        return np.maximum(abs(u), abs(v)) <= 0.8
    if kind == 3:
        return np.maximum(v, abs(u) * math.sqrt(0.75) - v / 2) <= 0.55
    if kind == 4:
        return (np.minimum(abs(u), abs(v)) <= 0.33) & (np.maximum(abs(u), abs(v)) <= 1)
    return abs(np.hypot(u, v) - 0.75) <= 0.27


def _texture(kind: int, u: Grid, v: Grid) -> NDArray[np.bool_]:
    """Plain, stripes, checks, dots or rings, in pixels; True is the lighter shade."""
    if kind == 1:
        return np.ones(u.shape, bool)
    if kind == 2:
        return u % 6 < 3
    if kind == 3:
        return (u % 8 < 4) ^ (v % 8 < 4)
    if kind == 4:
        return np.hypot(u % 6 - 3, v % 6 - 3) > 1.8
    return np.hypot(u, v) % 5 < 2.5


def prepare_shapes(out: str, seed: int = 0) -> DatasetInfo:
    """Makes the demo dataset at `out`, in this process; nothing is done if a dataset is there already.

    Args:
        out: a path or URI.
        seed: other seeds give other images and other split lists.

    Raises:
        UserError: what is there is no readable dataset.
    """
    root = storage.absolute(out)
    if storage.exists(storage.join(root, INFO_FILE)):
        return open_dataset(root).info
    rows = [_row(seed, index) for index in range(TRAIN + VAL)]
    subsets = {"train": rows[:TRAIN], "val": rows[TRAIN:]}
    pieces = shards.cut(subsets, sum(len(row.image) for row in rows) / len(rows))
    parts = [shards.write_shard(root, slot, members) for slot, members in pieces]
    return shards.finish(root, parts, name="shapes", facts=KNOWN["shapes"], seed=seed)


def _row(seed: int, index: int) -> shards.Row:
    """PNG on both sides: JPEG's halved colour resolution would wash out textures three pixels wide."""
    image, mask = render(seed, index)
    return shards.Row(f"shape_{index:04d}", encode_png(image), encode_png(mask), SIZE, SIZE)
