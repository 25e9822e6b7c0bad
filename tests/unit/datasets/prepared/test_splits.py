"""Generated lists, published lists, and what is refused."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.datasets.prepared import splits
from pipeline.datasets.prepared.dataset import INDEX_SCHEMA, Dataset, DatasetInfo
from pipeline.errors import UserError

RELEASED = Path(__file__).parents[3] / "data/splits"

ROLES = {f"t{i:03d}": "masked" for i in range(100)} | {"b0": "bare", "b1": "bare", "v0": "val"}


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def dataset(root: Path, roles: dict[str, str], protocol: str = "random") -> Dataset:
    rows = [
        dict.fromkeys(INDEX_SCHEMA.names, 1)
        | {"id": key, "subset": "val" if role == "val" else "train", "shard": "s"}
        | {"mask_bytes": 0 if role == "bare" else 9, "classes": []}
        for key, role in roles.items()
    ]
    info = DatasetInfo(
        name="n",
        classes=("a", "b"),
        palette=((0, 0, 0), (1, 1, 1)),
        counts={},
        evaluation="whole",
        protocol=protocol,
        index_hash="",
        shards={},
    )
    return Dataset(str(root), info, pa.Table.from_pylist(rows, INDEX_SCHEMA))


def test_generated_splits_are_nested_and_independent_of_order():
    made = {split.name: split for split in splits.generate(ROLES, "random", 0)}
    assert {name: len(split.labeled) for name, split in made.items()} == {
        "1_16": 6,
        "1_8": 12,
        "1_4": 25,
        "1_2": 50,
        "full": 100,
    }
    assert set(made["1_16"].labeled) < set(made["1_8"].labeled) < set(made["1_2"].labeled)
    backwards = dict(reversed(ROLES.items()))
    assert splits.generate(backwards, "random", 0) == splits.generate(ROLES, "random", 0)
    for other in (splits.generate(ROLES, "random", 1), splits.generate(ROLES, "random_2", 0)):
        assert other[0].digest != made["1_16"].digest
    for split in made.values():
        assert not set(split.labeled) & set(split.unlabeled)
        assert set(split.labeled) | set(split.unlabeled) == set(ROLES) - {"v0"}


def test_generated_known_answer():
    """Lists must never change with a version of Python or of the project: results would not compare."""
    known = ("t003", "t004", "t011", "t057", "t024", "t048")
    assert splits.generate(ROLES, "random", 0)[0].labeled == known


def test_tiny_sets_label_at_least_one_and_pools_none():
    assert [len(each.labeled) for each in splits.generate({"a": "masked", "v": "val"}, "random", 0)] == [1] * 5
    assert splits.generate({"a": "bare"}, "random", 0) == []


def test_full_without_anything_else_uses_all_images_twice(tmp_path):
    roles = {"a": "masked", "b": "masked", "v": "val"}
    for split in splits.generate(roles, "random", 0):
        splits.write_split(str(tmp_path), "random", split)
    full = splits.load_split(dataset(tmp_path, roles), "full")
    assert set(full.labeled) == set(full.unlabeled) == {"a", "b"}


def test_write_and_load_round_trip(tmp_path):
    for split in splits.generate(ROLES, "random", 0):
        splits.write_split(str(tmp_path), "random", split)
        assert splits.load_split(dataset(tmp_path, ROLES), split.name) == split


def test_missing_unlabeled_list_means_all_others(tmp_path):
    put(tmp_path / "splits/mine/few/labeled.txt", "t001\nt002")
    split = splits.load_split(dataset(tmp_path, ROLES), "few", "mine")
    assert split.labeled == ("t001", "t002")
    assert set(split.unlabeled) == set(ROLES) - {"v0", "t001", "t002"}


def test_digest_does_not_depend_on_the_order():
    one = splits.make_split("x", ["a", "b"], ["c"], {})
    assert one.digest == splits.make_split("y", ["b", "a"], ["d"], {}).digest
    assert one.digest != splits.make_split("x", ["a"], ["c"], {}).digest


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "words"),
    [
        ("t001\nnope\n", None, "labeled.txt: nope is not in the dataset"),
        ("t001\n", "t002\nnope\n", "unlabeled.txt: nope is not in the dataset"),
        ("t001\nv0\n", None, "v0 is a validation image"),
        ("t001\n", "v0", "v0 is a validation image"),
        ("t001\nb1\n", None, "b1 has no mask"),
        ("t001\nt002\n", "t003\nt002\n", "t002 is also in labeled.txt"),
        ("t001\nt001\n", None, "t001 is listed twice"),
        ("\n", None, "names no image"),
    ],
)
def test_bad_lists_are_named(tmp_path, labeled, unlabeled, words):
    put(tmp_path / "splits/random/1_2/labeled.txt", labeled)
    if unlabeled is not None:
        put(tmp_path / "splits/random/1_2/unlabeled.txt", unlabeled)
    with pytest.raises(UserError, match=words):
        splits.load_split(dataset(tmp_path, ROLES), "1_2")


def test_unknown_names_show_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="has no split lists"):
        splits.load_split(dataset(tmp_path, ROLES, protocol=""), "1_2")
    put(tmp_path / "splits/random/1_2/labeled.txt", "t001")
    put(tmp_path / "splits/mine/few/labeled.txt", "t001")
    with pytest.raises(UserError, match=r"no split '1_3'; there are 1_2$"):
        splits.load_split(dataset(tmp_path, ROLES), "1_3")
    with pytest.raises(UserError, match=r"no protocol 'classic'; there are mine, random$"):
        splits.load_split(dataset(tmp_path, ROLES), "1_2", "classic")
    with pytest.raises(UserError, match="leads out"):
        splits.load_split(dataset(tmp_path, ROLES), "../../1_2")


@pytest.mark.parametrize(
    "entry",
    [
        "t001",
        "JPEGImages/t001.jpg",
        "/JPEGImages/t001.jpg /SegmentationClassAug/t001.png",
        "leftImg8bit/train/ulm/t001_leftImg8bit.png",
    ],
)
def test_entries_may_be_paths(tmp_path, entry):
    put(tmp_path / "splits/random/1_2/labeled.txt", f"\ufeff{entry}\r\n")
    assert splits.load_split(dataset(tmp_path, ROLES), "1_2").labeled == ("t001",)


def released_roles(folder: Path) -> dict[str, str]:
    """Roles of all images that the lists of a release name, as a reader would call them."""
    lists = [folder / name for name in ("val.txt", *(f"{part}/{kind}.txt" for part, kind in PARTS[folder.name]))]
    names = [[Path(line).stem.removesuffix("_leftImg8bit") for line in file.read_text().split()] for file in lists]
    train = [name for part in names[1:] for name in part]
    return dict.fromkeys(train, "masked") | dict.fromkeys(names[0], "val")


PARTS = {
    "pascal": [("92", "labeled"), ("92", "unlabeled")],
    "cityscapes": [("186", "labeled"), ("186", "unlabeled")],
}


@pytest.mark.parametrize(
    ("folder", "protocol", "counts"),
    [
        ("pascal", "classic", {"1_16": 92, "1_8": 183, "1_4": 366, "1_2": 732, "full": 1464}),
        ("pascal", "blender", {"1_16": 662, "1_8": 1323, "1_4": 2646, "1_2": 5291}),
        ("cityscapes", "cityscapes", {"1_16": 186, "1_8": 372, "1_4": 744, "1_2": 1488}),
    ],
)
def test_published_lists_are_read_as_they_are(folder, protocol, counts):
    roles = released_roles(RELEASED / folder)
    train = {key for key, role in roles.items() if role != "val"}
    found = {each.name: each for each in splits.read_release(str(RELEASED / folder), protocol, roles)}
    assert {name: len(split.labeled) for name, split in found.items()} == counts
    for split in found.values():
        assert set(split.labeled) | set(split.unlabeled) == train
        assert len(split.labeled) + len(split.unlabeled) == len(train) == (10582 if folder == "pascal" else 2975)


def test_published_lists_of_another_set_are_refused():
    with pytest.raises(UserError, match=r"1464/labeled.txt: 2007_000032 is not in the dataset"):
        splits.read_release(str(RELEASED / "pascal"), "classic", ROLES)


def test_truncated_published_list_is_refused(tmp_path):
    put(tmp_path / "92/labeled.txt", "t001\nt002\n")
    with pytest.raises(UserError, match="2 images instead of 92"):
        splits.read_release(str(tmp_path), "classic", ROLES)


def test_own_lists_keep_their_names_and_dropped_images_are_passed_over(tmp_path):
    put(tmp_path / "few/labeled.txt", "t001\nimages/train/bad.jpg\n")
    put(tmp_path / "some/labeled.txt", "t002\n")
    found = splits.read_release(str(tmp_path), "mine", ROLES, {"train/bad"})
    assert [(each.name, each.labeled) for each in found] == [("few", ("t001",)), ("some", ("t002",))]
    with pytest.raises(UserError, match=r"no folder with a labeled.txt for protocol 'classic'"):
        splits.read_release(str(tmp_path), "classic", ROLES)
