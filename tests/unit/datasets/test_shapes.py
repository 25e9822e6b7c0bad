"""The generated demo set."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from pipeline.datasets import shapes
from pipeline.datasets.prepared.dataset import open_dataset, read_group
from pipeline.datasets.prepared.splits import load_split
from pipeline.errors import UserError


def test_samples_depend_on_seed_and_index_alone():
    image, mask = shapes.render(0, 5)
    again, _ = shapes.render(0, 5)
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((64, 64, 3), np.uint8, (64, 64), np.uint8)
    assert np.array_equal(image, again)
    assert not np.array_equal(image, shapes.render(0, 6)[0])
    assert not np.array_equal(image, shapes.render(1, 5)[0])


def test_every_class_is_common_and_has_its_hue():
    drawn = [shapes.render(0, index) for index in range(200)]
    masks = np.stack([mask for _, mask in drawn])
    shares = np.bincount(masks.ravel(), minlength=6) / masks.size
    assert 0.6 < shares[0] < 0.85
    assert (shares[1:] > 0.02).all()
    for kind in range(1, 6):
        pixels = np.concatenate([image[mask == kind] for image, mask in drawn])
        hues = np.asarray(Image.fromarray(pixels[None], "RGB").convert("HSV"))[0, :, 0] / 255
        angle = np.angle(np.exp(2j * np.pi * hues).mean()) / (2 * np.pi) % 1
        assert abs((angle - (kind - 1) / 5 + 0.5) % 1 - 0.5) < 0.03


def test_lookalikes_share_hues_and_textures():
    drawn = [shapes.render(0, index, "lookalikes") for index in range(300)]
    hues, shades = np.zeros(24), np.zeros(24)
    for kind in range(1, 25):
        pixels = np.concatenate([image[mask == kind] for image, mask in drawn])
        hue, _, value = np.moveaxis(np.asarray(Image.fromarray(pixels[None], "RGB").convert("HSV"))[0] / 255, -1, 0)
        hues[kind - 1] = np.angle(np.exp(2j * np.pi * hue).mean()) / (2 * np.pi) % 1
        shades[kind - 1] = value.mean()
    places = np.repeat(np.arange(6), 4) / 6
    assert (abs((hues - places + 0.5) % 1 - 0.5) < 0.04).all(), "four classes a hue"
    plain, textured = shades.reshape(6, 4)[:, 0], shades.reshape(6, 4)[:, 1:]
    assert (plain > textured.max(1)).all(), "textures have dark parts"


def test_prepare_shapes(tmp_path):
    root = str(tmp_path / "demo")
    started = time.process_time()
    info = shapes.prepare_shapes(root, seed=3)
    assert time.process_time() - started < 20  # a few seconds on a quiet machine
    assert info.counts == {"train": 400, "val": 150}
    dataset = open_dataset(root)
    groups = set(zip(*(dataset.subset("train")[name].to_pylist() for name in ("shard", "row_group")), strict=True))
    assert len(groups) >= 64
    assert not (tmp_path / "demo/parts").exists()
    row = dataset.subset("val").to_pylist()[7]
    table = read_group(root, row["shard"], row["row_group"], ["id", "image", "mask"])
    stored = table.slice(row["row"], 1).to_pylist()[0]
    image, mask = shapes.render(3, int(stored["id"].removeprefix("shape_")))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored["image"]))), image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored["mask"]))), mask)
    assert [len(load_split(dataset, name).labeled) for name in ("1_16", "1_2", "full")] == [25, 200, 400]
    with pytest.raises(UserError, match="holds a dataset already"):
        shapes.prepare_shapes(root, seed=4)
    (tmp_path / "demo/dataset.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        shapes.prepare_shapes(root, overwrite=True)
