"""What a look through a prepared dataset finds: each fault is put into a dataset that had none."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipeline.datasets import check as checking
from pipeline.datasets.check import Report, check
from pipeline.datasets.images import encode_png
from pipeline.datasets.prepared import shards
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.shards import Row

TRAIN, VAL = 24, 6


def row(key: str, seed: int, mask: np.ndarray | None) -> Row:
    image = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)
    return Row(key, encode_png(image), None if mask is None else encode_png(mask), 24, 32)


def rows(trees) -> dict[str, list[Row]]:
    """Clean samples of unequal images; the last four of train lack a mask."""
    train = [row(f"t{at}", at, trees.ids(at) if at < TRAIN - 4 else None) for at in range(TRAIN)]
    return {"train": train, "val": [row(f"v{at}", 100 + at, trees.ids(at)) for at in range(VAL)]}


def write(trees, root: Path, members: dict[str, list[Row]]) -> str:
    parts = [shards.write_shard(str(root), slot, found) for slot, found in shards.cut(members, 1e6)]
    shards.finish(str(root), parts, name="tiny", spec=trees.spec)
    return str(root)


def found(root: str) -> Report:
    return check(open_dataset(root))


@pytest.fixture
def clean(trees, tmp_path) -> str:
    return write(trees, tmp_path / "set", rows(trees))


def test_a_clean_dataset(trees, clean):
    report = found(clean)
    assert (report.problems, report.oddities) == ([], [])
    train, val = report.subsets
    assert [(each.name, each.images, each.masked) for each in (train, val)] == [("train", 24, 20), ("val", 6, 6)]
    assert train.sizes == [("32x24", 24)]
    counts = np.sum([np.bincount(trees.ids(at).ravel(), minlength=256) for at in range(20)], 0)
    assert train.pixels.tolist() == [*counts[:3], counts[255]]
    assert train.images_with.tolist() == [20, 20, 20]
    assert val.image_bytes == sum(len(each.image) for each in rows(trees)["val"])
    assert len(report.pictures) == checking.PICTURES
    assert all(each.image.shape == (24, 32, 3) and each.mask.shape == (24, 32) for each in report.pictures)


def test_splits(clean):
    splits = {(each.protocol, each.name): each for each in found(clean).splits}
    assert len(splits) == 15
    quarter = splits["random", "1_4"]
    assert (quarter.labeled, quarter.unlabeled, quarter.both, quarter.in_larger, quarter.absent) == (5, 19, 0, 5, ())
    assert splits["random", "full"].in_larger is None


def test_what_splits_lack_or_share(trees, tmp_path):
    members = rows(trees)
    members["train"][1] = row("t1", 7, np.zeros((24, 32), np.uint8))
    root = write(trees, tmp_path / "set", members)
    trees.put(tmp_path / "set/splits/mine/few/labeled.txt", "t1\n")
    trees.put(tmp_path / "set/splits/mine/more/labeled.txt", "t2\nt3\n")
    trees.put(tmp_path / "set/splits/mine/leak/labeled.txt", "v1\n")
    report = found(root)
    few, more = [each for each in report.splits if each.protocol == "mine"]
    assert (few.in_larger, few.absent, few.copies) == (0, ("thing", "other"), 1)
    assert (more.labeled, more.absent, more.copies) == (2, (), 0)
    assert report.problems == [
        "splits/mine/leak/labeled.txt: v1 is a validation image; it must not be trained on",
    ]
    assert "1 images are exact copies of others, first t1, t7" in report.oddities


def test_odd_masks(trees, tmp_path):
    members = rows(trees)
    members["train"][3] = row("t3", 3, np.full((24, 32), 255, np.uint8))
    members["val"][0] = row("v0", 100, np.where(trees.ids() == 255, 255, 1).astype(np.uint8))
    report = found(write(trees, tmp_path / "set", members))
    assert report.problems == []
    assert report.oddities == ["1 masks hold only ignored pixels: t3", "1 masks hold a single class: v0"]
    assert {each.id: each.note for each in report.pictures if each.note} == {
        "t3": "only ignored pixels",
        "v0": "a single class",
    }


def test_an_image_in_train_and_val_is_a_problem(trees, tmp_path):
    members = rows(trees)
    members["val"][2] = row("v2", 22, trees.ids())
    report = found(write(trees, tmp_path / "set", members))
    assert report.problems == ["1 images are both in train and in val, first t22, v2"]


def test_shards_are_compared_with_the_description(clean):
    shard = Path(clean) / "shards/train-00001.parquet"
    size = shard.stat().st_size
    (Path(clean) / "shards/stray.parquet").write_bytes(b"x")
    (Path(clean) / "shards/val-00001.parquet").unlink()
    shard.write_bytes(shard.read_bytes()[:-100])
    report = found(clean)
    assert report.problems[:2] == [
        "shards/val-00001.parquet is missing",
        f"shards/train-00001.parquet has {size - 100} bytes instead of {size}",
    ]
    assert all("shards/train-00001.parquet: row group" in problem for problem in report.problems[2:])
    assert len(report.problems) > 2
    assert report.oddities == ["shards/stray.parquet belongs to no dataset"]
    assert report.subsets[1].pixels.sum() == 3 * 24 * 32, "what can be read is counted"


def test_flipped_bytes_and_shards_of_another_dataset(trees, clean, tmp_path):
    one, two = (Path(clean) / f"shards/train-0000{at}.parquet" for at in (0, 1))
    data = bytearray(one.read_bytes())
    data[len(data) // 2] ^= 255
    one.write_bytes(data)
    other = {
        name: [Row(f"x{each.id}", *list(vars(each).values())[1:]) for each in members]
        for name, members in rows(trees).items()
    }
    write(trees, tmp_path / "other", other)
    two.write_bytes((tmp_path / "other/shards/train-00001.parquet").read_bytes())
    problems = found(clean).problems
    assert any(text.startswith("shards/train-00000.parquet: row group") for text in problems)
    assert "shards/train-00001.parquet: row group 0 holds other ids than the index says" in problems


def test_masks_that_prepare_would_have_refused(trees, tmp_path):
    members = rows(trees)
    members["train"][0] = row("t0", 0, np.full((24, 32), 9, np.uint8))
    members["train"][1] = row("t1", 1, trees.ids()[:12])
    members["train"][2] = Row("t2", members["train"][2].image, b"no PNG", 24, 32)
    problems = sorted(found(write(trees, tmp_path / "set", members)).problems)
    assert problems == [
        "t0: mask holds a value that is no class id",
        "t1: mask is 32x12, its image another size",
        "t2: unreadable mask (not a PNG)",
    ]


def test_a_pool_without_masks(trees, tmp_path):
    members = {"train": [row(f"t{at}", at, None) for at in range(4)], "val": []}
    report = found(write(trees, tmp_path / "pool", members))
    assert (report.problems, report.oddities, report.splits, report.pictures) == ([], [], [], [])
    assert report.subsets[1].images == 0


def test_one_row_group_at_a_time(clean, monkeypatch):
    asked: list[tuple[str, int]] = []

    def read(root: str, shard: str, row_group: int, columns: list[str]):
        asked.append((shard, row_group))
        return original(root, shard, row_group, columns)

    original = checking.read_group
    monkeypatch.setattr(checking, "read_group", read)
    monkeypatch.setattr(checking, "PICTURES", 0)
    found(clean)
    index = open_dataset(clean).index.to_pylist()
    assert sorted(asked) == sorted({(each["shard"], each["row_group"]) for each in index}), "each once"


def test_a_dataset_that_replaced_another_one_is_looked_through(trees, tmp_path):
    """Its shards lie in another folder; a file that belongs to none of them is odd."""
    root = write(trees, tmp_path / "set", rows(trees))
    folder = shards.begin(root, "another", overwrite=True)
    parts = [shards.write_shard(root, slot, found) for slot, found in shards.cut(rows(trees), 1e6, folder)]
    shards.finish(root, parts, name="tiny", spec=trees.spec)
    report = found(root)
    assert (report.problems, report.oddities) == ([], [])
    assert report.subsets[0].images_with.tolist() == [20, 20, 20]


def test_missing_lists_are_a_problem(clean):
    (Path(clean) / "splits/random/1_8/labeled.txt").unlink()
    assert any("splits/random/1_8/labeled.txt is missing" in problem for problem in found(clean).problems)


def test_masks_of_0_and_255(trees, tmp_path):
    members = {name: [row(each.id, at, (trees.ids(at) > 0).astype(np.uint8) * 255) for at, each in enumerate(found)]
               for name, found in rows(trees).items()}  # fmt: skip
    for found_in in members.values():
        for at, each in enumerate(found_in):
            counts = np.bincount((trees.ids(at) > 0).astype(np.uint8).ravel() * 255, minlength=256)
            found_in[at] = dataclasses.replace(each, pixels=tuple(counts.tolist()))
    problems = found(write(trees, tmp_path / "set", members)).problems
    (told,) = [problem for problem in problems if problem.startswith("no mask has a pixel of thing, other; ")]
    assert "255, which is ignored" in told
