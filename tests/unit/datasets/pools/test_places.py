"""Where a pool may be written, and what is deleted for it: what prepare wrote, and only when the new one is whole."""

from pathlib import Path

import pytest

from pipeline import storage
from pipeline.datasets.pools import make, place
from pipeline.datasets.pools.make import make_pool
from pipeline.datasets.pools.pool import open_pool
from pipeline.errors import UserError
from pipeline.ingest.groups import PoolTable
from pipeline.ingest.order import LanePlan
from pipeline.ingest.read import read_inline
from pipeline.patience import Patience
from tests.s3 import S3Server
from tests.unit.datasets.pools.reading import everything, expected, photo, rows, write_tar


class _Killed(BaseException):
    pass


@pytest.fixture
def die_at(monkeypatch):
    """Kills prepare at its n-th change of the storage, a write or a deletion; says whether it came so far."""
    write, delete = storage.write_bytes, storage.delete

    def run(call, at: int) -> bool:
        left = [at]

        def counted(change):
            def changed(*arguments):
                left[0] -= 1
                if left[0] < 0:
                    raise _Killed
                change(*arguments)

            return changed

        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", counted(write))
            patch.setattr(storage, "delete", counted(delete))
            try:
                call()
            except _Killed:
                return True
        return False

    return run


@pytest.mark.parametrize("foreign", ["work/notes.txt", "gen-00000/a.txt", "gen-00000/part-0000000.parquet", "notes"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_place_with_files_of_others_is_refused(few, trees, tmp_path, foreign, overwrite, there):
    out = tmp_path / "out"
    trees.put(out / foreign, "mine")
    trees.put(out / ".DS_Store", "junk")
    with pytest.raises(UserError, match=rf"out: holds files that prepare did not write, such as {foreign}; choose"):
        make_pool("images", str(few if there else tmp_path / "nowhere"), str(out), overwrite=overwrite)
    assert everything(out) == {foreign: b"mine", ".DS_Store": b"junk"}


def test_a_plan_of_others_is_refused(few, trees, tmp_path):
    for text in ("{}", "our plan", '{"root": 1}', "[]"):
        trees.put(tmp_path / "out" / place.PLAN_FILE, text)
        with pytest.raises(UserError, match=r"work/plan\.json: prepare of this version did not write it"):
            make_pool("images", str(few), str(tmp_path / "out"))
        assert everything(tmp_path / "out") == {"work/plan.json": text.encode()}


def test_a_place_with_junk_alone_is_empty(few, trees, tmp_path):
    trees.put(tmp_path / "out/.DS_Store", "junk")
    trees.put(tmp_path / "out" / f"{place.PLAN_FILE}.0123abcd.tmp", "a write that was killed")
    assert rows(make_pool("images", str(few), str(tmp_path / "out"))) == expected(few)
    assert (tmp_path / "out/.DS_Store").exists()
    assert not (tmp_path / "out/work").exists()


def test_nothing_is_deleted_for_arguments_that_cannot_be(few, trees, tmp_path):
    out = tmp_path / "out"
    old = make_pool("images", str(few), str(out), copy=True)
    (tmp_path / "empty").mkdir()
    before = everything(out)
    for images, message in (("nowhere", "not found"), ("empty", "check --root and --source")):
        with pytest.raises(UserError, match=message):
            make_pool("images", str(tmp_path / images), str(out), overwrite=True)
        assert everything(out) == before
    assert open_pool(str(out)) == old


@pytest.mark.parametrize("at", range(6))
def test_what_another_call_began_goes_by_name(few, trees, tmp_path, die_at, at):
    write_tar(tmp_path / "tars/a.tar", expected(few))
    out = tmp_path / "out"
    assert die_at(lambda: make_pool("tar", str(tmp_path / "tars"), str(out)), at + 1)
    mine = {"gen-00000/a.txt": b"1", "gen-00000/keys/b": b"2", "work/notes.txt": b"3", "work/files-0.arrow": b"4"}
    for name, data in mine.items():
        trees.put(out / name, data)
    with pytest.raises(UserError, match="not found"):
        make_pool("images", str(tmp_path / "nowhere"), str(out))
    assert rows(make_pool("images", str(few), str(out))) == expected(few)
    there = everything(out)
    assert mine.items() <= there.items()
    assert sorted(there.keys() - mine.keys()) == [
        "gen-00000/keys/0000.parquet", "gen-00000/part-0000000.parquet", "pool.json",
    ]  # fmt: skip


def test_the_old_pool_stays_until_the_new_one_is_whole(few, trees, tmp_path, die_at):
    """Killed at every change of the storage: what is there is one of the two, and the same command goes on."""
    out, other = tmp_path / "out", tmp_path / "other"
    for number in range(30, 75):
        trees.put(other / f"{number}.jpg", photo(trees, number))
    old, new, kills = expected(few), expected(other), 0
    while True:
        make_pool("images", str(few), str(out), copy=True)
        trees.put(few / "more.jpg", photo(trees, 99))
        make_pool("images", str(few), str(out), copy=True, append=True)
        (few / "more.jpg").unlink()
        trees.put(out / "gen-00000/mine.txt", "mine")
        dead = die_at(lambda: make_pool("images", str(other), str(out), overwrite=True), kills)
        if dead:
            found = rows(open_pool(str(out)))
            assert found in ({**old, "more.jpg": photo(trees, 99)}, new)
            done = {file: (out / file).stat().st_mtime_ns for file in everything(out) if "gen-00002" in file}
            make_pool("images", str(other), str(out), overwrite=True)
            assert all((out / file).stat().st_mtime_ns == time for file, time in done.items()), "written once only"
        assert rows(open_pool(str(out))) == new
        assert open_pool(str(out)).info.first == 2
        assert sorted(everything(out)) == [
            "gen-00000/mine.txt", "gen-00002/keys/0000.parquet", "gen-00002/part-0000000.parquet", "pool.json",
        ]  # fmt: skip
        for file in everything(out):
            (out / file).unlink()
        if not dead:
            break
        kills += 1
    assert kills > 8


@pytest.mark.parametrize("flags", [{}, {"copy": True}])
def test_the_same_call_goes_on_wherever_it_was_killed(few, tmp_path, die_at, flags):
    kills = 0
    while die_at(lambda: make_pool("images", str(few), str(tmp_path / f"{kills}"), **flags), kills):  # noqa: B023
        assert rows(make_pool("images", str(few), str(tmp_path / f"{kills}"), **flags)) == expected(few)
        assert sorted(everything(tmp_path / f"{kills}")) == [
            "gen-00000/keys/0000.parquet", "gen-00000/part-0000000.parquet", "pool.json",
        ]  # fmt: skip
        kills += 1
    assert kills > 8


@pytest.mark.parametrize("at", [4, 8, 9, 10])
def test_append_after_an_overwrite_that_was_killed(few, trees, tmp_path, die_at, at):
    out = tmp_path / "out"
    make_pool("images", str(few), str(out), copy=True)
    assert die_at(lambda: make_pool("images", str(few), str(out), copy=True, overwrite=True), at)
    trees.put(few / "new.jpg", photo(trees, 42))
    pool = make_pool("images", str(few), str(out), copy=True, append=True)
    assert [each.rows for each in pool.info.generations] == [20, 1]
    assert rows(pool) == expected(few)
    folders = {file.split("/")[0] for file in everything(out)}
    assert folders == {"pool.json", *(f"gen-{number:05d}" for number in pool.info.folders)}


def test_a_pool_made_anew_of_the_same_is_the_same(few, tmp_path):
    """The order of rows does not depend on the folders, nor does what a run stores about its pools."""
    orders, firsts = [], []
    for _ in range(3):
        pool = make_pool("images", str(few), str(tmp_path / "out"), overwrite=True)
        units = LanePlan(PoolTable(pool, 1), 2, 0).units(range(2), 0)
        read = (table["id"].take(list(unit.order)).to_pylist() for unit, table in read_inline(units, None, Patience()))
        orders.append((pool.digest(1), [next(read) for _ in range(9)]))
        firsts.append(pool.info.first)
    assert firsts == [0, 1, 2]
    assert orders[0] == orders[1] == orders[2]


def test_links_inside_a_pool_are_left_alone(few, trees, tmp_path):
    trees.put(tmp_path / "elsewhere/notes.txt", "mine")
    make_pool("images", str(few), str(tmp_path / "out"))
    (tmp_path / "out/gen-00000/away").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out/gen-00000/broken").symlink_to(tmp_path / "nowhere")
    make_pool("images", str(few), str(tmp_path / "out"), overwrite=True)
    assert sorted(each.name for each in (tmp_path / "out/gen-00000").iterdir()) == ["away", "broken"]
    assert (tmp_path / "elsewhere/notes.txt").read_text() == "mine"


def test_object_stores(s3: S3Server, few, tmp_path):
    root = f"{s3.bucket_uri}/{tmp_path.name}/pool"
    storage.write_bytes(f"{root}/gen-00000/a.txt", b"mine")
    with pytest.raises(UserError, match=r"holds files that prepare did not write, such as gen-00000/a\.txt"):
        make_pool("images", str(few), root)
    assert storage.list_files(root) == ["gen-00000/a.txt"]
    storage.delete(f"{root}/gen-00000/a.txt")
    make_pool("images", str(few), root)
    storage.write_bytes(f"{root}/gen-00000/a.txt", b"mine")
    pool = make_pool("images", str(few), root, copy=True, overwrite=True)
    assert rows(pool) == expected(few)
    assert storage.list_files(root) == [
        "gen-00000/a.txt", "gen-00001/keys/0000.parquet", "gen-00001/part-0000000.parquet", "pool.json",
    ]  # fmt: skip


def test_every_name_that_is_written_can_be_deleted(few, tmp_path, monkeypatch):
    """What prepare writes must never be foreign to it."""
    written, write = [], storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: (written.append(uri), write(uri, data)))
    monkeypatch.setattr(make, "KEYS_PER_RUN", 5)
    make_pool("images", str(few), str(tmp_path / "out"))
    names = [str(Path(uri).relative_to(tmp_path / "out")) for uri in written]
    assert len(names) > 8
    assert [name for name in names if not place.is_written(name)] == ["pool.json"]
