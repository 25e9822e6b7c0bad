"""Checks of single files, shards as they are written and read, and what is said about damage. No Ray."""

import dataclasses
import io
import json
import pickle
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.datasets.prepared import shards, splits
from pipeline.datasets.prepared.dataset import SHARD_SCHEMA, DatasetInfo, open_dataset, read_group
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
from pipeline.datasets.specs import KNOWN, voc_palette, with_values
from pipeline.errors import UserError

LOOKUP = class_lookup(3)


@pytest.fixture
def dataset(trees, tmp_path: Path) -> str:
    """Six train images (one unlabeled) in groups of two, two val images."""
    samples = read_voc(Folders(str(trees.voc(tmp_path / "voc", train=6, masked=5))))
    root = str(tmp_path / "out")
    subsets = {name: [each for each in samples if each.subset == name] for name in ("train", "val")}
    parts = [
        shards.write_shard(root, shards.Slot(name, 0, 2), [read_row(each, trees.spec, PhotoRules()) for each in found])
        for name, found in subsets.items()
    ]
    shards.finish(root, parts, name="tiny", spec=trees.spec)
    return root


def test_round_trip(dataset, trees, tmp_path):
    opened = pickle.loads(pickle.dumps(open_dataset(dataset)))
    assert opened.info.counts == {"train": 6, "val": 2}
    assert (opened.info.classes, opened.info.protocol) == (trees.spec.classes, "random")
    assert opened.subset("val")["id"].to_pylist() == ["v0", "v1"]
    for row in opened.index.to_pylist():
        table = read_group(opened.root, row["shard"], row["row_group"], SHARD_SCHEMA.names)
        stored = table.slice(row["row"], 1).to_pylist()[0]
        assert stored["id"] == row["id"]
        assert stored["image"] == (tmp_path / f"voc/JPEGImages/{row['id']}.jpg").read_bytes()
        assert (len(stored["image"]), len(stored["mask"] or b"")) == (row["image_bytes"], row["mask_bytes"])
        assert (stored["height"], stored["width"]) == (row["height"], row["width"]) == (24, 32)
        if stored["mask"] is not None:
            source = Image.open(tmp_path / f"voc/SegmentationClass/{row['id']}.png")
            mask = Image.open(io.BytesIO(stored["mask"]))
            assert mask.mode == "L"
            assert np.array_equal(np.asarray(mask), np.asarray(source))
    assert [row["id"] for row in opened.index.to_pylist() if row["mask_bytes"] == 0] == ["a5"]


def test_shards_are_plain_and_columns_selectable(dataset):
    meta = pq.ParquetFile(f"{dataset}/shards/train-00000.parquet").metadata
    assert [meta.row_group(group).num_rows for group in range(meta.num_row_groups)] == [2, 2, 2]
    chunk = meta.row_group(0).column(1)
    assert (chunk.compression, chunk.has_dictionary_page, chunk.is_stats_set) == ("UNCOMPRESSED", False, False)
    table = read_group(dataset, "shards/train-00000.parquet", 2, ["image", "id"])
    assert (table.column_names, table.num_rows) == (["image", "id"], 2)


def test_every_flipped_byte_of_a_page_is_noticed(dataset):
    path = Path(dataset) / "shards/train-00000.parquet"
    good = path.read_bytes()
    image = read_group(dataset, "shards/train-00000.parquet", 0, ["image"])["image"][0].as_py()
    start = good.index(image)
    for offset in range(start, start + len(image), 97):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :])
        with pytest.raises(UserError, match=r"train-00000.parquet: row group 0 is damaged"):
            read_group(dataset, "shards/train-00000.parquet", 0, ["id", "image"])
        assert read_group(dataset, "shards/train-00000.parquet", 1, ["id", "image"]).num_rows == 2


@pytest.mark.parametrize("cut", [0, 3, 200, -1, -30])
def test_truncated_shards_are_noticed(dataset, cut):
    path = Path(dataset) / "shards/train-00000.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="row group 0 is damaged"):
        read_group(dataset, "shards/train-00000.parquet", 0, ["id"])


def test_missing_shard_and_group(dataset):
    with pytest.raises(UserError, match="not found"):
        read_group(dataset, "shards/train-00009.parquet", 0, ["id"])
    with pytest.raises(UserError, match="it has 3 row groups"):
        read_group(dataset, "shards/train-00000.parquet", 3, ["id"])
    with pytest.raises(UserError, match="leads out"):
        read_group(dataset, "../voc/x.parquet", 0, ["id"])


def test_brief_trouble_is_waited_for(dataset, monkeypatch):
    real, answers = storage.resolve, ["AWS Error SLOW_DOWN during GetObject", "AWS Error NETWORK_CONNECTION"]

    def flaky(uri: str):
        if answers:
            raise OSError(answers.pop())
        return real(uri)

    monkeypatch.setattr(storage, "resolve", flaky)
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    assert read_group(dataset, "shards/train-00000.parquet", 0, ["id"]).num_rows == 2
    assert not answers


def test_half_written_and_missing_datasets(dataset, tmp_path):
    with pytest.raises(UserError, match="no dataset there"):
        open_dataset(str(tmp_path / "nowhere"))
    (Path(dataset) / "dataset.json").unlink()
    (Path(dataset) / "prepare.json").touch()
    with pytest.raises(UserError, match="prepare did not finish; run it again"):
        open_dataset(dataset)
    (Path(dataset) / "index.parquet").unlink()
    with pytest.raises(UserError, match="prepare did not finish; run it again"):
        open_dataset(dataset)


def test_tampered_index_and_info(dataset):
    index, info = Path(dataset) / "index.parquet", Path(dataset) / "dataset.json"
    good = index.read_bytes()
    index.write_bytes(good + b"\0")
    with pytest.raises(UserError, match="not the file that"):
        open_dataset(dataset)
    index.write_bytes(good)
    values = json.loads(info.read_text())
    for text, words in (
        (json.dumps(values | {"schema_version": 99}), "format version 99, this program reads 1"),
        (json.dumps({"name": "x"}), "dataset.json: not readable"),
        ("[]", "dataset.json: not readable"),
        ("{", "dataset.json: not readable"),
    ):
        info.write_text(text)
        with pytest.raises(UserError, match=words):
            open_dataset(dataset)


def test_a_finished_dataset_is_protected(dataset, tmp_path):
    before = files_of(dataset)
    with pytest.raises(UserError, match="pass --overwrite"):
        shards.begin(dataset, "plan", overwrite=False)
    assert files_of(dataset) == before
    assert shards.begin(dataset, "plan", overwrite=True) == "shards-2"
    assert files_of(dataset) == {*before, "prepare.json"}
    assert shards.begin(str(tmp_path / "free"), "plan", overwrite=False) == "shards"


def files_of(root: str) -> set[str]:
    return set(storage.list_files(root))


def write(root: str, trees, seed: int) -> None:
    """A dataset whose images are told apart by `seed`."""
    folder = shards.begin(root, f"plan {seed}", overwrite=True)
    image = trees.encode(np.full((24, 32, 3), seed, np.uint8))
    rows = [shards.Row(f"{seed}-{number}", image, trees.mask(), 24, 32) for number in range(4)]
    pieces = shards.cut({"train": rows, "val": []}, 1e3, folder)
    shards.finish(root, [shards.write_shard(root, *piece) for piece in pieces], name=f"set {seed}", spec=trees.spec)


def test_what_is_replaced_stays_until_the_new_one_is_whole(trees, tmp_path, monkeypatch):
    root = str(tmp_path)
    write(root, trees, 1)
    mine = tmp_path / "splits/mine/few/labeled.txt"
    trees.put(mine, "1-0")
    trees.put(tmp_path / "notes.txt", "of my own")
    before = files_of(root)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for module, name in ((shards, "write_shard"), (splits, "write_split")):
        monkeypatch.setattr(module, name, fail)
        with pytest.raises(KeyboardInterrupt):
            write(root, trees, 2)
        monkeypatch.undo()
        assert files_of(root) >= before
        old = open_dataset(root)
        assert old.info.name == "set 1"
        assert len(read_group(root, old.index["shard"][0].as_py(), 0, ["id"]))
    write(root, trees, 2)
    new = open_dataset(root)
    assert new.info.name == "set 2"
    assert new.index["shard"][0].as_py().startswith("shards-2/")
    assert read_group(root, new.index["shard"][0].as_py(), 0, ["id"])["id"][0].as_py().startswith("2-")
    lists = set(new.info.lists)
    assert files_of(root) == {
        *new.info.shards,
        *lists,
        new.info.index,
        "dataset.json",
        "notes.txt",
        "splits/mine/few/labeled.txt",
    }
    write(root, trees, 3)
    assert open_dataset(root).index["shard"][0].as_py().startswith("shards/")
    assert mine.read_text() == "1-0"


def test_only_what_prepare_wrote_is_deleted(trees, tmp_path):
    """What an interrupted attempt by another plan has left goes; what is beside it stays, or is refused."""
    root = str(tmp_path / "out")
    folder = shards.begin(root, "one", overwrite=False)
    shards.write_shard(root, shards.Slot("train", 0, 2, folder), [shards.Row("a", b"x", None, 1, 1)])
    trees.put(tmp_path / "out/work/notes.txt", "of my own")
    assert shards.begin(root, "two", overwrite=False) == "shards"
    assert files_of(root) == {"prepare.json", "work/notes.txt"}
    trees.put(tmp_path / "out/shards/mine.parquet", "of my own")
    with pytest.raises(UserError, match=r"shards/mine\.parquet: was not written by prepare"):
        shards.begin(root, "three", overwrite=False)
    assert files_of(root) >= {"work/notes.txt", "shards/mine.parquet"}


def test_a_place_that_is_not_ours_is_refused(trees, tmp_path):
    trees.put(tmp_path / "work/notes.txt", "of my own")
    for place in (tmp_path, tmp_path / "work"):
        with pytest.raises(UserError, match=r"holds files that prepare did not write, such as (work/)?notes\.txt"):
            shards.begin(str(place), "plan", overwrite=False)
    trees.put(tmp_path / "out/.DS_Store", "junk")
    trees.put(tmp_path / "out/raw/images/train/a.jpg", trees.image())
    inputs = [str(tmp_path / "out/raw")]
    with pytest.raises(UserError, match="such as raw/images"):
        shards.begin(str(tmp_path / "out"), "plan", overwrite=False)
    assert shards.begin(str(tmp_path / "out"), "plan", overwrite=False, inputs=inputs) == "shards"
    trees.put(tmp_path / "lists/splits/random/1_2/labeled.txt", "a")
    lists = str(tmp_path / "lists")
    with pytest.raises(UserError, match=r"splits/random/1_2/labeled\.txt: was not written by prepare"):
        shards.begin(lists, "plan", overwrite=False, inputs=[lists], protocols=["random"])
    trees.put(tmp_path / "own/index.parquet", "of my own")
    own = str(tmp_path / "own")
    with pytest.raises(UserError, match=r"index\.parquet: was not written by prepare"):
        shards.begin(own, "plan", overwrite=False, inputs=[own])


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


def test_the_background_is_the_class_of_that_name():
    """CamVid's class 0 is sky, ADE20K's wall: nothing may take class 0 for the background."""
    known = {name: _info(spec.classes).background for name, spec in KNOWN.items()}
    assert {name for name, background in known.items() if background == 0} == {"voc", "shapes", "lookalikes"}
    assert set(known.values()) == {0, None}
    assert _info(("road", "background")).background == 1


def _info(classes: tuple[str, ...]) -> DatasetInfo:
    return DatasetInfo(
        name="n", classes=classes, palette=voc_palette(len(classes)), counts={}, evaluation="whole", protocol="",
        index_hash="", shards={},
    )  # fmt: skip
