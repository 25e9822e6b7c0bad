"""Pools as they are made and read, step by step; Ray itself is tested with a real cluster."""

import dataclasses
import hashlib
import itertools
import json
import pickle
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.datasets.pools import make, place
from pipeline.datasets.pools.make import make_pool
from pipeline.datasets.pools.pool import WORK_FOLDER, PoolInfo, open_pool, part_name
from pipeline.errors import UserError
from pipeline.ingest.groups import PoolTable
from pipeline.ingest.read import pack_item, read_item, read_rows
from pipeline.patience import Patience
from tests.unit.datasets.pools.reading import expected, photo, rows, write_tar


@pytest.mark.parametrize("copy", [False, True])
def test_images(photos, tmp_path, copy):
    pool = make_pool("images", str(photos), str(tmp_path / "pool"), name="mine", copy=copy)
    assert pickle.loads(pickle.dumps(pool)) == pool == open_pool(f"{tmp_path}/pool/")
    assert pool.info == PoolInfo.from_json(pool.info.to_json())
    assert (pool.info.name, pool.info.kind, pool.info.group_rows) == ("mine", "bytes" if copy else "links", 16)
    (generation,) = pool.info.generations
    assert (generation.rows, generation.shards) == (300, 3)
    assert generation.bytes == sum(map(len, expected(photos).values()))
    assert rows(pool) == expected(photos)
    assert list(rows(pool)) != sorted(rows(pool))
    assert not (tmp_path / "pool/work").exists()
    sizes = []
    for number in range(3):
        file = pq.ParquetFile(tmp_path / "pool" / part_name(0, number))
        sizes += [file.metadata.row_group(each).num_rows for each in range(file.num_row_groups)]
    assert sizes == [16] * 18 + [12]


def test_opening_reads_one_small_file(photos, tmp_path):
    made = make_pool("images", str(photos), str(tmp_path / "pool"))
    for folder in (tmp_path / "pool").glob("gen-*"):
        folder.rename(tmp_path / "elsewhere")
    pool = open_pool(str(tmp_path / "pool"))
    assert pool == made
    assert len(PoolTable(pool, 1)) == 19


def test_the_order_is_the_same_for_any_number_of_runs(photos, tmp_path, monkeypatch):
    one = make_pool("images", str(photos), str(tmp_path / "one"))
    monkeypatch.setattr(make, "KEYS_PER_RUN", 30)
    monkeypatch.setattr(make, "KEYS_GROUP", 7)
    many = make_pool("images", str(photos), str(tmp_path / "many"))
    assert len(list((tmp_path / "many/gen-00000/keys").iterdir())) == 11
    assert list(rows(one).items()) == list(rows(many).items())


@pytest.mark.parametrize("runs", [(300, 300), (7, 300), (300, 13)])
def test_append_adds_what_is_new_and_rewrites_nothing(photos, trees, tmp_path, monkeypatch, runs):
    root = str(tmp_path / "pool")
    monkeypatch.setattr(make, "KEYS_PER_RUN", runs[0])
    first = make_pool("images", str(photos), root)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "pool/gen-00000").rglob("*.parquet")}
    old = rows(first)
    assert make_pool("images", str(photos), root, append=True) == first
    assert sorted(file.name for file in (tmp_path / "pool").iterdir()) == ["gen-00000", "pool.json"]
    for number in range(300, 357):
        trees.put(photos / f"new/{number}.jpg", photo(trees, number))
    monkeypatch.setattr(make, "KEYS_PER_RUN", runs[1])
    second = make_pool("images", str(photos), root, append=True)
    assert [each.rows for each in second.info.generations] == [300, 57]
    assert rows(second) == expected(photos)
    assert rows(second, 1) == old
    assert second.digest(1) == first.digest(1) != second.digest(2)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    trees.put(photos / "new/357.jpg", photo(trees, 357))
    assert make_pool("images", str(photos), root, append=True).info.generations[-1].rows == 1


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_call_goes_on(photos, tmp_path, monkeypatch, after):
    """`after` counts writes below the generation: keys first, then parts."""
    root, write, left = str(tmp_path / "pool"), storage.write_bytes, [after]

    def dying(uri: str, data: bytes) -> None:
        if "gen-" in uri:
            left[0] -= 1
            if left[0] < 0:
                raise _Killed
        write(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", dying)
        with pytest.raises(_Killed):
            make_pool("images", str(photos), root)
    with pytest.raises(UserError, match="prepare did not finish; run it again"):
        open_pool(root)
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "pool/gen-00000").rglob("*.parquet")}
    assert len(done) == after
    pool = make_pool("images", str(photos), root)
    assert {file: file.stat().st_mtime_ns for file in done} == done, "written once only"
    assert rows(pool) == expected(photos)
    assert pool.info == make_pool("images", str(photos), str(tmp_path / "calm")).info


def test_what_another_call_left_is_not_taken_up(photos, tmp_path):
    root = tmp_path / "pool"
    other = place.PoolPlan(str(root), "tar", "elsewhere", "links", 0, 0, "")
    storage.write_bytes(f"{root}/{part_name(0, 0)}", b"of another call")
    storage.write_bytes(f"{root}/{WORK_FOLDER}/plan.json", json.dumps(dataclasses.asdict(other)).encode())
    assert rows(make_pool("images", str(photos), str(root))) == expected(photos)


def test_finished_pools_are_not_overwritten(photos, tmp_path):
    root = str(tmp_path / "pool")
    make_pool("images", str(photos), root)
    with pytest.raises(UserError, match="--append adds new images, --overwrite replaces it"):
        make_pool("images", str(photos), root)
    with pytest.raises(UserError, match=r"was made with --source images --root .*photos; append the same"):
        make_pool("images", str(photos), root, append=True, copy=True)
    with pytest.raises(UserError, match="exclude each other"):
        make_pool("images", str(photos), root, append=True, overwrite=True)
    assert make_pool("images", str(photos), root, copy=True, overwrite=True).info.kind == "bytes"


def test_damaged_images(photos, tmp_path):
    (photos / "0/000.jpg").write_bytes(b"<html>")
    (photos / "0/003.jpg").write_bytes(b"")
    root = str(tmp_path / "pool")
    with pytest.raises(UserError, match=r"photos/0/00\d.jpg: unreadable image.*1 more bad images; .*--skip_bad"):
        make_pool("images", str(photos), root, copy=True)
    pool = make_pool("images", str(photos), root, copy=True, skip_bad=True)
    assert rows(pool) == {**expected(photos), "0/000.jpg": b"", "0/003.jpg": b""}
    assert pool.info.generations[0].blank == 2
    assert pool.summary == "298 images, 2 left out, in 1 generations, 298 in the last; bytes"
    assert pool.images(1) == 298


def test_damaged_images_that_were_mended(photos, trees, tmp_path):
    """The same command goes on with them, although they were of another size when it listed them."""
    (photos / "0/000.jpg").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"0/000\.jpg: unreadable image"):
        make_pool("images", str(photos), str(tmp_path / "pool"), copy=True)
    trees.put(photos / "0/000.jpg", photo(trees, 0))
    assert rows(make_pool("images", str(photos), str(tmp_path / "pool"), copy=True)) == expected(photos)


def test_what_was_left_out_is_counted_over_interruptions(photos, tmp_path, monkeypatch):
    """All parts are written by a call that dies before pool.json."""
    bad = {f"{number % 3}/{number:03d}.jpg": b"" for number in range(0, 300, 60)}
    for name in bad:
        (photos / name).write_bytes(b"no picture")
    root, write = str(tmp_path / "pool"), storage.write_bytes

    def dying(uri: str, data: bytes) -> None:
        if uri.endswith("pool.json"):
            raise _Killed
        write(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", dying)
        with pytest.raises(_Killed):
            make_pool("images", str(photos), root, copy=True, skip_bad=True)
    with pytest.raises(UserError, match=r"jpg: unreadable image.*4 more bad images"):
        make_pool("images", str(photos), root, copy=True)
    pool = make_pool("images", str(photos), root, copy=True, skip_bad=True)
    assert (pool.images(1), pool.info.generations[0].blank) == (295, 5)
    assert rows(pool) == {**expected(photos), **bad}


def test_pools_of_before_have_left_nothing_out(photos, tmp_path):
    pool = make_pool("images", str(photos), str(tmp_path / "pool"))
    values = json.loads((tmp_path / "pool/pool.json").read_text())
    del values["first"], values["column"], values["generations"][0]["blank"]
    assert PoolInfo.from_json(json.dumps(values)) == pool.info
    assert pool.digest(1) == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def test_one_task_reads_parts_with_and_without_bad_images(few, trees, tmp_path):
    make_pool("images", str(few), str(tmp_path / "pool"), copy=True)
    trees.put(few / "new.jpg", b"no picture")
    pool = make_pool("images", str(few), str(tmp_path / "pool"), copy=True, append=True, skip_bad=True)
    table = PoolTable(pool, 2)
    groups = [table[number] for number in range(len(table))]
    block = read_item({"item": [pack_item(groups, None, Patience())]})
    assert sorted(block["id"].to_pylist()) == sorted(expected(few))


def test_no_usable_image(few, trees, tmp_path):
    good = expected(few)
    for name in good:
        trees.put(few / name, b"no picture")
    root = str(tmp_path / "pool")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"few: none of its 20 images can be used; .*few/\d+\.jpg: unreadable image"
        ):
            make_pool("images", str(few), root, copy=True, skip_bad=True)
    for name, data in good.items():
        trees.put(few / name, data)
    assert rows(make_pool("images", str(few), root, copy=True, skip_bad=True)) == good
    trees.put(few / "new.jpg", b"no picture")
    assert [each.blank for each in make_pool("images", str(few), root, copy=True, append=True, skip_bad=True)
            .info.generations] == [0, 1]  # fmt: skip


def test_a_vanished_image_has_no_bytes(photos, tmp_path):
    pool = make_pool("images", str(photos), str(tmp_path / "pool"))
    (photos / "1/001.jpg").unlink()
    assert rows(pool) == {**expected(photos), "1/001.jpg": b""}


@pytest.mark.parametrize("copy", [False, True])
def test_tar_files(trees, tmp_path, copy):
    members_of = {}
    for number in range(9):
        name = f"{number}/shard.tar"
        members = {f"{key:03d}.jpg": photo(trees, number * 10 + key) for key in range(10)}
        long = {("x" * 150) + ".png": trees.image("PNG")}
        write_tar(tmp_path / "tars" / name, {**members, **long, "000.json": b"{}", "000.cls": b"1"})
        members_of |= {f"{name}/{key}": data for key, data in (members | long).items()}
    pool = make_pool("tar", str(tmp_path / "tars"), str(tmp_path / "pool"), copy=copy)
    assert rows(pool) == members_of


def test_bad_tar_files(trees, tmp_path):
    whole = tmp_path / "tars/a.tar"
    write_tar(whole, {f"{key}.jpg": trees.image() for key in range(5)})
    for name, data in {"cut": whole.read_bytes()[:3000], "text": b"no tar" * 400}.items():
        (tmp_path / "tars/b.tar").write_bytes(data)
        with pytest.raises(UserError, match=r"tars/b\.tar: not a whole uncompressed tar file"):
            make_pool("tar", str(tmp_path / "tars"), str(tmp_path / name))
    write_tar(tmp_path / "tars/b.tar", {"0.jpg": trees.image()}, "w:gz")
    with pytest.raises(UserError, match=r"tars/b\.tar: not a whole uncompressed tar file"):
        make_pool("tar", str(tmp_path / "tars"), str(tmp_path / "gz"))
    write_tar(tmp_path / "none/a.tar", {"0.txt": b"text"})
    with pytest.raises(UserError, match=r"none: the \.tar files in it hold no images"):
        make_pool("tar", str(tmp_path / "none"), str(tmp_path / "out"))


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_files(trees, tmp_path, struct):
    images = [photo(trees, number) for number in range(130)]
    (tmp_path / "raw").mkdir()
    for number, start in enumerate(range(0, 130, 50)):
        part = images[start : start + 50]
        column = pa.array([{"bytes": each, "path": "p"} for each in part]) if struct else pa.array(part)
        table = pa.table({"image": column, "other": pa.array(part)})
        pq.write_table(table, tmp_path / f"raw/{number}.parquet", row_group_size=17)
    pool = make_pool("parquet", str(tmp_path / "raw"), str(tmp_path / "pool"))
    assert (pool.info.kind, pool.info.generations[0].rows) == ("bytes", 130)
    found = rows(pool)
    assert sorted(found.values()) == sorted(images)
    assert found["1.parquet#2.3"] == images[50 + 2 * 17 + 3]
    assert list(found.values()) != images


def test_bad_parquet_files(trees, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    pq.write_table(pa.table({"caption": ["a"]}), raw / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no column `image` .* its columns are \['caption'\]"):
        make_pool("parquet", str(raw), str(tmp_path / "pool"))
    (raw / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        make_pool("parquet", str(raw), str(tmp_path / "pool"))
    pq.write_table(pa.table({"image": pa.array([trees.image(), None])}), raw / "a.parquet")
    with pytest.raises(UserError, match=r"raw/a\.parquet#0\.1: unreadable image"):
        make_pool("parquet", str(raw), str(tmp_path / "pool"))
    assert (
        sorted(map(len, rows(make_pool("parquet", str(raw), str(tmp_path / "pool"), skip_bad=True)).values()))[0] == 0
    )


def test_mistakes(photos, trees, tmp_path):
    with pytest.raises(UserError, match="nowhere: not found"):
        make_pool("images", str(tmp_path / "nowhere"), str(tmp_path / "pool"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no \.jpg\|\.jpeg\|\.png.* files below it"):
        make_pool("images", str(tmp_path / "empty"), str(tmp_path / "pool"))
    with pytest.raises(UserError, match="lies inside --root"):
        make_pool("images", str(photos), str(photos / "pool"))
    with pytest.raises(UserError, match="no pool there"):
        make_pool("images", str(photos), str(tmp_path / "fresh"), append=True)
    trees.put(tmp_path / "set/dataset.json", "{}")
    with pytest.raises(UserError, match="holds a dataset"):
        make_pool("images", str(photos), str(tmp_path / "set"))
    trees.put(tmp_path / "old/pool.json", '{"schema_version": 7}')
    with pytest.raises(UserError, match=r"pool\.json: not readable \(format version 7, this program reads 1\)"):
        open_pool(str(tmp_path / "old"))


def test_the_listing_is_never_held(tmp_path, monkeypatch):
    """Ten times the files, the same memory."""

    def peak(files: int) -> int:
        root = str(tmp_path / str(next(numbers)))
        plan = place.PoolPlan(root, "images", "s3://bucket/photos", "links", 0, 0, "")
        monkeypatch.setattr(storage, "iter_files", lambda _: ((f"{number:09d}.jpg", 1) for number in range(files)))
        tracemalloc.start()
        assert make.list_images(plan).batches == files // 2000
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    numbers = itertools.count()
    small = dataclasses.replace(make.POOL_SOURCES["images"], batch=2000)
    monkeypatch.setitem(make.POOL_SOURCES, "images", small)
    peak(2000)  # imports what is imported late
    few = peak(4000)
    assert min(peak(40_000) for _ in range(2)) < 1.5 * few  # what other threads of this process hold comes on top


def test_names_that_no_uri_can_hold_are_left_out(photos, trees, tmp_path, capsys):
    trees.put(photos / "what?.jpg", trees.image())
    pool = make_pool("images", str(photos), str(tmp_path / "pool"))
    assert pool.info.generations[0].rows == 300
    assert "left out 1 files whose names no URI can hold, such as what?.jpg" in capsys.readouterr().err


def test_asking_again_for_linked_images_is_counted(photos, tmp_path, monkeypatch):
    """They are fetched in other threads than the one that reads the group."""
    pool = make_pool("images", str(photos), str(tmp_path / "pool"))
    group = PoolTable(pool, 1)[0]
    patience = Patience()
    expected, read, failed = read_rows(group, None, patience), storage.read_range, set()

    def flaky(uri: str, offset: int, size: int) -> bytes:
        if uri not in failed:
            failed.add(uri)
            raise TimeoutError("no answer")
        return read(uri, offset, size)

    monkeypatch.setattr(storage, "read_range", flaky)
    monkeypatch.setattr("pipeline.patience.time.sleep", lambda seconds: None)
    table = read_rows(group, None, patience)
    assert table.equals(expected)
    assert patience.retries == len(failed) == table.num_rows
