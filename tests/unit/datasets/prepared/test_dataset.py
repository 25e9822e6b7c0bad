"""Checks of single files, shards as they are written and read, and what is said about damage. No Ray."""

import hashlib
import io
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.datasets.prepared import shards, splits
from pipeline.datasets.prepared.dataset import (
    OLDER_INDEX,
    SHARD_SCHEMA,
    DatasetInfo,
    Place,
    open_dataset,
    read_group,
    read_places,
)
from pipeline.datasets.prepared.prepare import (
    read_row,
)
from pipeline.datasets.raw.layouts import Folders, read_voc
from pipeline.datasets.raw.masks import class_lookup
from pipeline.datasets.raw.photos import PhotoRules
from pipeline.datasets.specs import KNOWN, voc_palette
from pipeline.errors import UserError
from pipeline.patience import Patience

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


def test_the_index_says_where_each_file_lies(dataset):
    opened = open_dataset(dataset)
    assert opened.located
    for row in opened.index.to_pylist():
        shard, table = (
            f"{dataset}/{row['shard']}",
            read_group(dataset, row["shard"], row["row_group"], ["image", "mask"]),
        )
        for column, stored in table.slice(row["row"], 1).to_pylist()[0].items():
            place = Place(*(row[f"{column}_{name}"] for name in ("at", "bytes", "crc")))
            if stored is None:
                assert place == (0, 0, 0)
            else:
                assert [bytes(part) for part in read_places(shard, [place], ["x"], 0.0, Patience())] == [stored]


def test_places_are_read_together_while_what_lies_between_is_little(tmp_path, monkeypatch):
    data = bytes(range(256)) * 4
    (tmp_path / "file").write_bytes(data)
    places = [Place(start, size, zlib.crc32(data[start : start + size])) for start, size in
              ((500, 100), (0, 100), (110, 100), (900, 100), (215, 85))]  # fmt: skip
    asked: list[tuple[int, int]] = []
    original = storage.read_range

    def watched(uri: str, offset: int, size: int) -> bytes:
        asked.append((offset, size))
        return original(uri, offset, size)

    monkeypatch.setattr(storage, "read_range", watched)
    for spare, expected in (
        (0.0, [(0, 100), (110, 100), (215, 85), (500, 100), (900, 100)]),
        (0.05, [(0, 300), (500, 100), (900, 100)]),
        (0.5, [(0, 600), (900, 100)]),
        (2.0, [(0, 1000)]),
    ):
        asked.clear()
        found = read_places(str(tmp_path / "file"), places, ["x"] * 5, spare, Patience())
        assert [bytes(part) for part in found] == [data[place.start : place.start + place.size] for place in places]
        assert asked == expected
    wrong = [*places[:3], places[3]._replace(crc=0)]
    with pytest.raises(UserError, match=r"file: c is damaged \(checksum of the bytes from 900 on\); prepare the data"):
        read_places(str(tmp_path / "file"), wrong, ["a", "b", "d", "c"], 0.2, Patience())
    with pytest.raises(UserError, match="is damaged"):  # the file ends before
        read_places(str(tmp_path / "file"), [Place(1000, 100, 1)], ["x"], 0.2, Patience())


def test_an_index_of_version_0_1_0_is_read(dataset):
    index = pq.read_table(f"{dataset}/index.parquet").select(OLDER_INDEX.names)
    pq.write_table(index, f"{dataset}/index.parquet")
    info = json.loads(Path(f"{dataset}/dataset.json").read_text())
    info["index_hash"] = hashlib.sha256(Path(f"{dataset}/index.parquet").read_bytes()).hexdigest()
    Path(f"{dataset}/dataset.json").write_text(json.dumps(info))
    opened = open_dataset(dataset)
    assert not opened.located
    assert opened.index.equals(index)


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
    monkeypatch.setattr("pipeline.patience.time.sleep", lambda _: None)
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
    trees.put(tmp_path / "out/mine/notes.txt", "of my own")
    assert shards.begin(root, "two", overwrite=False) == "shards"
    assert files_of(root) == {"prepare.json", "mine/notes.txt"}
    trees.put(tmp_path / "out/shards/mine.parquet", "of my own")
    with pytest.raises(UserError, match=r"shards/mine\.parquet: was not written by prepare"):
        shards.begin(root, "three", overwrite=False)
    assert files_of(root) >= {"mine/notes.txt", "shards/mine.parquet"}


def test_a_place_that_is_not_ours_is_refused(trees, tmp_path):
    trees.put(tmp_path / "mine/notes.txt", "of my own")
    for place in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UserError, match=r"holds files that prepare did not write, such as (mine/)?notes\.txt"):
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
