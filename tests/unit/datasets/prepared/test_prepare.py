"""From checked samples to shards: what is read, refused and told on the way; Ray is tested with a real cluster."""

import dataclasses
import io
import re
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.datasets.prepared import shards
from pipeline.datasets.prepared.dataset import DatasetInfo
from pipeline.datasets.prepared.prepare import (
    ShardPlan,
    carry_out,
    check_parts,
    check_pixels,
    read_row,
    summary,
    warnings,
)
from pipeline.datasets.raw.layouts import Folders, read_voc
from pipeline.datasets.raw.masks import canonical_mask, class_lookup
from pipeline.datasets.raw.photos import BadSampleError, PhotoRules, check_image
from pipeline.datasets.specs import KNOWN, with_values
from pipeline.errors import UserError

LOOKUP = class_lookup(3)


@pytest.mark.parametrize(
    ("train", "mean", "groups", "files"),
    [(400, 9e3, 67, 9), (367, 71e3, 74, 9), (10582, 110e3, 279, 22), (2975, 2.3e6, 2975, 52), (3, 1e3, 3, 3)],
)
def test_cut_gives_many_groups_and_files_of_bounded_size(train, mean, groups, files):
    pieces = [
        piece for piece in shards.cut({"train": range(train), "val": range(7)}, mean) if piece[0].subset == "train"
    ]
    sizes = [len(found) for _, found in pieces]
    group_rows = pieces[0][0].group_rows
    assert [row for _, found in pieces for row in found] == list(range(train))
    assert sum(-(-size // group_rows) for size in sizes) == groups
    assert len(pieces) == files
    assert all(size % group_rows == 0 for size in sizes[:-1])
    assert max(sizes) * mean <= shards.SHARD_BYTES
    assert len({slot.shard for slot, _ in pieces}) == files


def test_a_shard_of_the_same_plan_is_kept(trees, tmp_path):
    tree = trees.voc(tmp_path / "voc")
    samples = tuple(each for each in read_voc(Folders(str(tree))) if each.subset == "train")
    plan = ShardPlan(
        str(tmp_path / "out"), shards.Slot("train", 0, 2), samples, trees.spec, PhotoRules(), skip_bad=False
    )
    first = carry_out(plan)
    written = (tmp_path / "out" / plan.slot.shard).stat().st_mtime_ns
    assert carry_out(plan) == first
    assert (tmp_path / "out" / plan.slot.shard).stat().st_mtime_ns == written
    trees.put(tree / "SegmentationClass/a1.png", trees.encode(np.ones((24, 32), np.uint8)))  # mended meanwhile
    assert carry_out(plan).pixels != first.pixels
    trees.put(tree / "JPEGImages/a0.jpg", "no image any more")
    other = ShardPlan(plan.root, plan.slot, samples[::-1], trees.spec, PhotoRules(), skip_bad=False)
    again = carry_out(other)
    assert list(again.bad) == ["a0"]
    assert again.size == 0


def test_skipped_samples_are_recorded(trees, tmp_path):
    tree = trees.voc(tmp_path / "voc")
    trees.put(tree / "JPEGImages/a1.jpg", "<html>")
    samples = tuple(each for each in read_voc(Folders(str(tree))) if each.subset == "train")
    plan = ShardPlan(
        str(tmp_path / "out"), shards.Slot("train", 0, 2), samples, trees.spec, PhotoRules(), skip_bad=True
    )
    part = carry_out(plan)
    assert [(row["id"], row["row_group"], row["row"]) for row in part.index] == [
        ("a0", 0, 0),
        ("a2", 0, 1),
        ("a3", 1, 0),
    ]
    info = shards.finish(plan.root, [part], name="n", spec=trees.spec)
    assert (info.skipped, info.counts["train"]) == (1, 3)


def test_images(trees):
    for data in (trees.image(), trees.image("PNG"), trees.image(channels=1), trees.image("JPEG", 4, "CMYK")):
        assert check_image(data) == (24, 32)
    for data, words in (
        (b"", "unreadable image \\(no bytes"),
        (b"<html>error</html>", "not a JPEG"),
        (trees.image("GIF"), "not a JPEG"),
        (trees.encode(trees.ids().astype(np.uint16)), "16 bits a channel, expected 8"),
        (trees.image()[:400], "unreadable image"),
        (trees.image("PNG")[:-60], "unreadable image"),
        (bomb(12000, 12000), "unreadable image|more than 64,000,000"),
        (bomb(8001, 8001), "more than 64,000,000"),
    ):
        with pytest.raises(BadSampleError, match=words):
            check_image(data)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_masks(trees):
    ids = trees.ids()
    for data in (trees.mask(), trees.encode(ids)):
        stored = Image.open(io.BytesIO(canonical_mask(data, (24, 32), LOOKUP).data))
        assert stored.mode == "L"
        assert np.array_equal(np.asarray(stored), ids)


def test_bad_masks_are_named(trees):
    wrong = trees.ids().copy()
    wrong[0, :5] = 19
    deep = trees.ids().astype(np.uint16) + 1
    for data, words in (
        (trees.encode(wrong, mode="P"), "holds 19 at 5 pixels"),
        (trees.encode(trees.ids()[:, :31]), "mask is 31x24, its image 32x24"),
        (trees.encode(deep), "mask holds values from 1 to 256: class ids are 0 to 254"),
        (trees.image("PNG"), r"colour picture; say what its colours are: --values '#[0-9a-f]{6}=ID,.*,\.\.\.'"),
        (trees.image("JPEG", 1), "unreadable mask"),
        (trees.mask()[:60], "unreadable mask"),
    ):
        with pytest.raises(BadSampleError, match=words):
            canonical_mask(data, (24, 32), LOOKUP)


def test_label_ids_are_mapped(trees):
    spec = KNOWN["cityscapes"]
    raw = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 34
    lookup = class_lookup(19, spec.label_ids)
    mask = np.asarray(Image.open(io.BytesIO(canonical_mask(trees.encode(raw), (24, 32), lookup).data)))
    assert np.array_equal(mask, np.vectorize(spec.label_ids.__getitem__)(raw))
    with pytest.raises(BadSampleError, match="holds 34"):
        canonical_mask(trees.encode(raw + np.uint8(1)), (24, 32), lookup)


def test_masks_of_sbd(trees):
    ids = trees.ids() % 255
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(canonical_mask(trees.mat(ids), (24, 32), LOOKUP).data))), ids
    )
    for data, words in (
        (trees.mat(ids + np.uint8(1)), "holds 3 at"),
        (trees.mat(ids[:, :31]), "mask is 31x24"),
        (trees.mat(ids.astype(np.int16)), "mask of int16"),
        (trees.mat(ids)[:200], "unreadable mask"),
    ):
        with pytest.raises(BadSampleError, match=words):
            canonical_mask(data, (24, 32), LOOKUP)


def test_masks_of_sbd_without_scipy(trees, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="pip install scipy"):
        canonical_mask(trees.mat(trees.ids() % 255), (24, 32), LOOKUP)


def test_colour_masks(trees):
    ids = trees.ids()
    colors = {0x000000: 0, 0x800000: 1, 0x0000FF: 2, 0xFFFFFF: 255}
    by_id = np.array([[key >> 16, key >> 8 & 255, key & 255] for key in colors], np.uint8)
    painted = by_id[np.minimum(ids, 3)]
    for data in (trees.encode(painted), trees.encode(np.dstack([painted, ids]), mode="RGBA")):
        stored = Image.open(io.BytesIO(canonical_mask(data, (24, 32), LOOKUP, colors).data))
        assert stored.mode == "L"
        assert np.array_equal(np.asarray(stored), ids)
    painted[0, :2] = (1, 2, 3)
    with pytest.raises(BadSampleError, match="holds #010203 at 2 pixels, to which no class is given"):
        canonical_mask(trees.encode(painted), (24, 32), LOOKUP, colors)


def test_the_bad_file_is_named(trees, tmp_path):
    tree = trees.voc(tmp_path / "voc")
    trees.put(tree / "SegmentationClass/a0.png", b"x")
    with pytest.raises(BadSampleError, match=r"SegmentationClass/a0.png: unreadable mask"):
        read_row(read_voc(Folders(str(tree)))[0], trees.spec, PhotoRules())


def test_a_rotation_that_a_mask_does_not_fit_is_named(trees, tmp_path):
    tree = trees.voc(tmp_path / "voc")
    trees.put(tree / "JPEGImages/a0.jpg", trees.turned(6))
    trees.put(tree / "SegmentationClass/a0.png", trees.encode(trees.ids()[:, :20]))
    with pytest.raises(BadSampleError, match=r"mask is 20x24, its image 32x24; the image carries an EXIF rotation"):
        read_row(read_voc(Folders(str(tree)))[0], trees.spec, PhotoRules())


def test_palettes_of_masks_that_differ_are_refused(trees, tmp_path):
    """Of classes that nobody knows the colours of, two masks must agree; --values says what counts instead."""
    tree = trees.voc(tmp_path / "voc", train=3)
    image = Image.frombytes("P", (32, 24), trees.ids(1).tobytes())
    image.putpalette([1, 2, 3] * 256)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    trees.put(tree / "SegmentationClass/a1.png", buffer.getvalue())
    samples = tuple(each for each in read_voc(Folders(str(tree))) if each.subset == "train")
    slot = shards.Slot("train", 0, 2)
    part = carry_out(ShardPlan(str(tmp_path / "out"), slot, samples, trees.spec, PhotoRules(), skip_bad=False))
    assert list(part.bad) == ["a1"]
    assert re.search(r"a1\.png: its palette gives 0 the colour #010203, that of \S+a0\.png #000000", part.bad["a1"])
    chosen = tuple(dataclasses.replace(each, label_ids=True) for each in samples)
    spec = with_values(trees.spec, "0=0,1=1,2=2")
    assert not carry_out(ShardPlan(str(tmp_path / "out"), slot, chosen, spec, PhotoRules(), skip_bad=False)).bad


def test_classes_that_no_mask_shows_are_told():
    known = {
        "name": "x",
        "palette": ((0, 0, 0),) * 2,
        "evaluation": "whole",
        "protocol": "",
        "index_hash": "",
        "shards": {},
    }
    info = DatasetInfo(
        classes=("bg", "polyp"), counts={"train": 3, "val": 1}, masked={"train": 2, "val": 1}, skipped=1,
        pixels={"train": (67, 0, 33), "val": (67, 0, 33)}, **known,
    )  # fmt: skip
    assert (info.unseen("val"), info.ignored("train", "val")) == (("polyp",), 0.33)
    (line,) = warnings(info)
    assert line.startswith("no mask has a pixel of class polyp; 33 % of the pixels are 255, which is ignored; if 255 ")
    assert line.endswith("--values 0=0,255=1")
    assert summary(info, {}) == "3 train (2 with a mask), 1 val, 1 skipped"
    assert summary(info, {".heic": 2, ".gif": 1}).endswith("; passed over: 1 .gif, 2 .heic")
    full = dataclasses.replace(info, pixels={"train": (60, 1, 33), "val": (67, 0, 33)})
    assert (full.unseen("val"), full.unseen("train", "val"), warnings(full)) == (("polyp",), (), [])
    assert dataclasses.replace(info, pixels={}).unseen("val") == ()  # made by an older version: not counted


def test_what_is_left_without_bad_samples_must_do(trees, tmp_path):
    tree = trees.voc(tmp_path / "voc", train=2)
    parts = {}
    for subset in ("train", "val"):
        samples = tuple(each for each in read_voc(Folders(str(tree))) if each.subset == subset)
        plan = ShardPlan(str(tmp_path / "out"), shards.Slot(subset, 0, 2), samples, trees.spec, PhotoRules(), True)
        parts[subset] = carry_out(plan)
    check_parts([*parts.values()])
    nothing = {subset: dataclasses.replace(part, index=[]) for subset, part in parts.items()}
    with pytest.raises(UserError, match="all train images are bad"):
        check_parts([nothing["train"], parts["val"]])
    with pytest.raises(UserError, match="all validation images are bad"):
        check_parts([parts["train"], nothing["val"]])


def test_masks_without_a_pixel_to_learn_from_are_refused(trees, tmp_path):
    tree = trees.voc(tmp_path / "voc", train=2)
    for name in ("a0", "a1"):
        trees.put(tree / f"SegmentationClass/{name}.png", trees.encode(np.full((24, 32), 255, np.uint8)))
    samples = read_voc(Folders(str(tree)))
    slots = {"train": shards.Slot("train", 0, 2), "val": shards.Slot("val", 0, 2)}
    parts = [
        carry_out(ShardPlan(str(tmp_path / "out"), slot, tuple(each for each in samples if each.subset == name),
                            trees.spec, PhotoRules(), skip_bad=False))
        for name, slot in slots.items()
    ]  # fmt: skip
    with pytest.raises(
        UserError, match=r"every pixel of the train masks is 255, which is ignored: .* nothing to learn"
    ):
        check_pixels(parts)
    check_pixels(parts[1:])
