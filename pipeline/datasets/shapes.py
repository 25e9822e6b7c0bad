"""Generated datasets: coloured, textured shapes before a smooth background, made without any download.

`shapes` is the demo. Every class has its own hue, its own texture and its own outline, so a small network from scratch
learns it from few labels, and the unlabeled images have something to add; with weaker cues semi-supervised training
has nothing to amplify.

`lookalikes` has many classes, and each is easily taken for others: a class shares its hue with three classes and its
texture with five, and its outline says nothing.
"""

import colorsys
import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pipeline import storage
from pipeline.datasets.images import encode_png
from pipeline.datasets.prepared import shards
from pipeline.datasets.prepared.dataset import DatasetInfo
from pipeline.datasets.prepared.splits import GENERATED
from pipeline.datasets.specs import KNOWN

SIZE = 64
TRAIN, VAL = 400, 150
HUE_SPREAD = 0.25
"""Deviation of a class's hue, in distances between neighbouring hues."""
NOISE_STD = 10.0
"""Grey levels."""
Grid = NDArray[np.float64]


class Look(NamedTuple):
    """What objects of one class look like."""

    hue: int
    """Place on a colour circle of as many hues as the dataset has."""
    texture: int
    """1 plain, 2 stripes, 3 checks, 4 dots, 5 rings."""
    outline: int | None
    """1 disk, 2 square, 3 triangle, 4 cross, 5 ring; None: each object has any of them."""


LOOKS: dict[str, tuple[Look, ...]] = {
    "shapes": tuple(Look(kind, kind + 1, kind + 1) for kind in range(5)),
    "lookalikes": tuple(Look(hue, texture, None) for hue, texture in itertools.product(range(6), (1, 2, 3, 5))),
}
"""Classes 1, 2, ... of each generated dataset."""


def render(seed: int, index: int, name: str = "shapes") -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draws one sample, a pure function of the arguments.

    Args:
        seed: of the dataset.
        index: of the sample.
        name: a dataset out of `LOOKS`.

    Returns:
        The image [64,64,3] and the mask [64,64] of class ids, 0 for the background.
    """
    rng, looks = np.random.default_rng([seed, index]), LOOKS[name]
    hues = 1 + max(look.hue for look in looks)
    image = _background(rng)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(rng.integers(2, 6)):
        kind = int(rng.integers(1, 1 + len(looks)))
        look = looks[kind - 1]
        inside, shade = _draw(rng, look)
        image[inside] = _color(rng, look.hue / hues + rng.normal(0.0, HUE_SPREAD / hues)) * shade[inside, None]
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


def _color(rng: Generator, hue: float) -> Grid:
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.45, 0.85), rng.uniform(0.5, 1.0)))


def _draw(rng: Generator, look: Look) -> tuple[NDArray[np.bool_], Grid]:
    """Places one object: which pixels it covers [64,64] and how bright its texture is there [64,64]."""
    center, radius, angle = (
        rng.uniform(0.1 * SIZE, 0.9 * SIZE, 2),
        rng.uniform(6, 14),
        rng.uniform(0, 2 * math.pi),
    )
    y, x = np.mgrid[:SIZE, :SIZE] - center[:, None, None]
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    outline = look.outline or int(rng.integers(1, 6))
    return _covers(outline, u / radius, v / radius), np.where(_texture(look.texture, u, v), 1.0, 0.7)


def _covers(outline: int, u: Grid, v: Grid) -> NDArray[np.bool_]:
    """Disk, square, triangle, cross or ring of radius 1 around the origin."""
    if outline == 1:
        return np.hypot(u, v) <= 0.9
    if outline == 2:
        return np.maximum(abs(u), abs(v)) <= 0.8
    if outline == 3:
        return np.maximum(v, abs(u) * math.sqrt(0.75) - v / 2) <= 0.55
    if outline == 4:
        return (np.minimum(abs(u), abs(v)) <= 0.33) & (np.maximum(abs(u), abs(v)) <= 1)
    return abs(np.hypot(u, v) - 0.75) <= 0.27


def _texture(texture: int, u: Grid, v: Grid) -> NDArray[np.bool_]:
    """Plain, stripes, checks, dots or rings, in pixels; True is the lighter shade."""
    if texture == 1:
        return np.ones(u.shape, bool)
    if texture == 2:
        return u % 6 < 3
    if texture == 3:
        return (u % 8 < 4) ^ (v % 8 < 4)
    if texture == 4:
        return np.hypot(u % 6 - 3, v % 6 - 3) > 1.8
    return np.hypot(u, v) % 5 < 2.5


def prepare_shapes(out: str, seed: int = 0, name: str = "shapes", *, overwrite: bool = False) -> DatasetInfo:
    """Makes a generated dataset at `out`, in this process.

    Args:
        out: a path or URI.
        seed: other seeds give other images and other split lists.
        name: which one, out of `LOOKS`.
        overwrite: replace a dataset that is there.

    Raises:
        UserError: a dataset is there already, or files that prepare did not write.
    """
    root = storage.absolute(out)
    folder = shards.begin(root, f"{name}/{seed}", overwrite=overwrite, protocols=GENERATED)
    rows = [_row(seed, index, name) for index in range(TRAIN + VAL)]
    subsets = {"train": rows[:TRAIN], "val": rows[TRAIN:]}
    pieces = shards.cut(subsets, sum(len(row.image) for row in rows) / len(rows), folder)
    parts = [shards.write_shard(root, slot, members) for slot, members in pieces]
    return shards.finish(root, parts, name=name, spec=KNOWN[name], seed=seed)


def _row(seed: int, index: int, name: str) -> shards.Row:
    """PNG on both sides: JPEG's halved colour resolution would wash out textures three pixels wide."""
    image, mask = render(seed, index, name)
    pixels = tuple(np.bincount(mask.ravel(), minlength=256).tolist())
    return shards.Row(f"shape_{index:04d}", encode_png(image), encode_png(mask), SIZE, SIZE, pixels)
