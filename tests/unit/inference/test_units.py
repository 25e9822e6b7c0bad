"""What `u2pl predict` is asked to look at: names, units, digests."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.datasets.pools.pool import BYTES_SCHEMA, LINKS_SCHEMA, POOL_FILE, Generation, PoolInfo
from pipeline.datasets.prepared.dataset import open_dataset, read_group
from pipeline.errors import UserError
from pipeline.inference.units import UNIT_IMAGES, Listing, list_images, read_images
from pipeline.patience import Patience


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 10, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def put(folder: Path, *names: str) -> str:
    for seed, name in enumerate(names):
        storage.write_bytes(str(folder / name), photo(seed))
    return str(folder)


def names(listing: Listing) -> list[str]:
    return [name for unit in listing.units for name in unit.names]


def read(listing: Listing) -> Iterator[tuple[str, bytes]]:
    for unit in listing.units:
        yield from ((unit.names[at], data) for at, data in read_images(unit, Patience()))


def test_files_are_named_as_they_lie(root: str) -> None:
    files = ["b/two.JPG", "one.2024.06.png", "a.jpeg", ".hidden/x.jpg", "__MACOSX/y.jpg", "z.heic", "notes.txt"]
    for seed, name in enumerate(files):
        storage.write_bytes(f"{root}/{name}", photo(seed))
    found = list_images(root)
    assert names(found) == ["a", "b/two", "one.2024.06"]
    assert dict(read(found)) == {"a": photo(2), "b/two": photo(0), "one.2024.06": photo(1)}
    assert found.passed == {".heic": 1}
    assert names(list_images(root, flat=True)) == ["a", "b__two", "one.2024.06"]


def test_units_hold_some_tens_of_images_and_one_reads_what_is_wanted(tmp_path: Path) -> None:
    found = list_images(put(tmp_path, *(f"{number:03d}.jpg" for number in range(2 * UNIT_IMAGES + 3))))
    assert [len(unit.ids) for unit in found.units] == [UNIT_IMAGES, UNIT_IMAGES, 3]
    assert [unit.number for unit in found.units] == [0, 1, 2]
    chosen = list(read_images(found.units[1], Patience(), {"034", "040", "001"}))
    assert chosen == [(2, photo(34)), (8, photo(40))]


def test_a_file_that_has_vanished_has_no_bytes(tmp_path: Path) -> None:
    found = list_images(put(tmp_path, "a.jpg", "b.jpg"))
    (tmp_path / "a.jpg").unlink()
    assert dict(read(found)) == {"a": b"", "b": photo(1)}


def test_a_name_that_nothing_can_have_is_kept_for_the_list_of_what_is_left_out(tmp_path: Path) -> None:
    found = list_images(put(tmp_path, "a\nb.jpg", "c.jpg"))
    assert found.units[0].ids == ("a\\nb.jpg", "c.jpg")
    assert names(found) == ["", "c"]
    assert [name for name, _ in read(found)] == ["c"]


@pytest.mark.parametrize(
    ("files", "flat", "said"),
    [
        (["a.jpg", "a.png"], False, r"a\.jpg and a\.png would both be written as a; rename one"),
        (["b/c.jpg", "b__c.jpg"], True, r"b/c\.jpg and b__c\.jpg would both be written as b__c"),
        ([], False, "no images there; check --images"),
        (["a.heic"], False, r"no images there \(1 \.heic are kinds that are not read\)"),
    ],
)
def test_what_cannot_be_listed(tmp_path: Path, files: list[str], flat: bool, said: str) -> None:
    with pytest.raises(UserError, match=said):
        list_images(put(tmp_path, *files), flat=flat)


def test_what_is_no_folder(tmp_path: Path) -> None:
    folder = put(tmp_path, "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg: is a file; name the folder"):
        list_images(f"{folder}/a.jpg")
    with pytest.raises(UserError, match="not found"):
        list_images(f"{folder}/gone")
    with pytest.raises(UserError, match=r"--subset val: .* is no prepared dataset"):
        list_images(folder, "val")


def test_the_digest_is_that_of_names_sizes_and_cut(tmp_path: Path) -> None:
    folder = put(tmp_path, "a.jpg", "b/c.jpg")
    first = list_images(folder).digest
    assert list_images(f"{folder}/").digest == first
    assert list_images(folder, flat=True).digest != first
    storage.write_bytes(f"{folder}/a.jpg", photo(0) + b" ")
    second = list_images(folder).digest
    put(tmp_path, "a.jpg", "b/c.jpg", "d.jpg")
    assert len({first, second, list_images(folder).digest}) == 3


# ---- pools and datasets -----------------------------------------------------------------------------------------


def write_pool(root: Path, ids: list[str], links: str = "") -> str:
    """A pool in row groups of four; `links`: the folder that the files are in."""
    columns = [ids, [photo(seed) for seed in range(len(ids))]]
    table = pa.table(columns, schema=BYTES_SCHEMA)
    if links:
        sizes = [len(each) for each in columns[1]]
        table = pa.table([ids, ids, [0] * len(ids), sizes], schema=LINKS_SCHEMA)
    generation = Generation(rows=len(ids), shards=1, bytes=1000, digest="d")
    info = PoolInfo(
        name="p", source="images", root=links, kind="links" if links else "bytes", group_rows=4, groups_per_shard=100,
        generations=(generation,),
    )  # fmt: skip
    (root / "gen-00000").mkdir(parents=True)
    pq.write_table(table, root / "gen-00000/part-0000000.parquet", row_group_size=4)
    (root / POOL_FILE).write_text(info.to_json())
    return str(root)


@pytest.mark.parametrize("linked", [False, True])
def test_a_pool_is_cut_between_its_row_groups(tmp_path: Path, linked: bool) -> None:
    ids = [f"x/{number:02d}.jpg" for number in range(UNIT_IMAGES + 6)]
    photos = put(tmp_path / "photos", *ids)
    found = list_images(write_pool(tmp_path / "pool", ids, photos if linked else ""))
    assert [len(unit.ids) for unit in found.units] == [UNIT_IMAGES, 6]
    assert dict(read(found)) == {f"x/{number:02d}": photo(number) for number in range(len(ids))}
    assert [at for at, _ in read_images(found.units[1], Patience(), {"x/33", "x/37"})] == [1, 5]


def test_members_of_tar_files_have_names(tmp_path: Path) -> None:
    found = list_images(write_pool(tmp_path / "pool", ["0.tar/./a.jpg", "0.tar/caf\\xe9.jpg", "0.parquet#1.7"]))
    assert names(found) == ["0.tar/a", "", "0.parquet#1.7"]


def test_a_dataset_and_its_parts(shapes: str, tmp_path: Path) -> None:
    dataset, found = open_dataset(shapes), list_images(shapes)
    assert sorted(names(found)) == sorted(dataset.index["id"].to_pylist())
    row = dataset.index.slice(450, 1).to_pylist()[0]
    table = read_group(dataset.root, row["shard"], row["row_group"], ["id", "image"])
    assert dict(read(found))[row["id"]] == table["image"][row["row"]].as_py()
    val = list_images(shapes, "val")
    assert sorted(names(val)) == sorted(dataset.subset("val")["id"].to_pylist())
    assert len({found.digest, val.digest, list_images(shapes, "train").digest}) == 3
    with pytest.raises(UserError, match="no unlabeled images there"):
        list_images(shapes, "unlabeled")
    other = tmp_path / "other"
    other.mkdir()
    (other / "dataset.json").write_text(replace(dataset.info, index_hash="0").to_json())
    with pytest.raises(UserError, match=r"index\.parquet"):
        list_images(str(other))
