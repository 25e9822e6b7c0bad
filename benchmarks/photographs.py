"""A dataset of made photographs with the sizes of VOC, for what is measured on many of them."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from pipeline.datasets.images import encode_png
from pipeline.datasets.prepared import shards
from pipeline.datasets.specs import KNOWN

HEIGHT, WIDTH, DISTINCT, LABELED = 375, 500, 256, 64


def photograph(seed: int) -> bytes:
    """Noise of every wavelength, as photographs have it, as a JPEG."""
    rng = np.random.default_rng(seed)
    picture = np.full((HEIGHT, WIDTH, 3), 118.0)
    for cells in (3, 9, 27, 81, 243):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells * 4 // 3, 3), np.uint8))
        picture += (np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) - 127.5) / cells**0.35
    sharp = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).filter(ImageFilter.UnsharpMask(1, 60))
    buffer = io.BytesIO()
    sharp.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def make_images(
    count: int, roots: Sequence[str], folder: Path | None = None, *, distinct: int = DISTINCT, val: int = 4
) -> float:
    """Writes photographs as a dataset of 21 classes.

    Args:
        count: of images without a mask; `LABELED` come on top.
        roots: where to write the dataset, once each.
        folder: gets the images without a mask as files, too; must not exist.
        distinct: photographs that are made; they come again and again.
        val: validation images, at most `distinct`.

    Returns:
        Their mean size in bytes.
    """
    pictures = [photograph(seed) for seed in range(distinct)]
    mask = encode_png((np.indices((HEIGHT, WIDTH)) // 80).sum(0).astype(np.uint8))
    if folder:
        folder.mkdir()
    rows = []
    for number in range(count + LABELED):
        data = pictures[number % distinct]
        labeled = number < LABELED
        rows.append(shards.Row(f"{number:06d}", data, mask if labeled else None, HEIGHT, WIDTH))
        if folder and not labeled:
            (folder / f"{number:06d}.jpg").write_bytes(data)
    scored = [shards.Row(f"val{number}", pictures[number], mask, HEIGHT, WIDTH) for number in range(val)]
    order = np.random.default_rng(0).permutation(len(rows))
    mean = sum(map(len, pictures)) / distinct
    pieces = shards.cut({"train": [rows[place] for place in order], "val": scored}, mean)
    for root in roots:
        parts = [shards.write_shard(root, slot, members) for slot, members in pieces]
        shards.finish(root, parts, name="noise", spec=KNOWN["voc"])
    return mean
