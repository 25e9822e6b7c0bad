"""The inline reader and the cutting of the plan; Ray Data itself is tested with a real cluster."""

import dataclasses
import itertools
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.datasets.pools.pool import LINKS_SCHEMA
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.ingest import read
from pipeline.ingest.groups import Group, select_groups
from pipeline.ingest.order import LanePlan, Unit
from pipeline.patience import Patience


@pytest.fixture
def units(shapes: str) -> list[Unit]:
    dataset = open_dataset(shapes)
    ids = dataset.subset("train")["id"].to_pylist()[::2]
    return list(islice(LanePlan(select_groups(dataset, ids), 4, 0).units(range(4), 0), 30))


def test_inline_reads_id_and_image_of_each_unit(units):
    for (unit, table), expected in zip(read.read_inline(units, None, Patience()), units, strict=True):
        assert unit is expected
        assert table.column_names == ["id", "image"]
        assert tuple(table["id"].to_pylist()) == unit.group.ids
        assert sum(map(len, table["image"].to_pylist())) == unit.group.size


def test_segments_hold_all_units_in_order_and_are_bounded(units, monkeypatch):
    monkeypatch.setattr(read, "ITEM_ROWS", 12)
    monkeypatch.setattr(read, "SEGMENT_ITEMS", 2)
    segments = list(read.cut_segments(iter(units)))
    flat = [unit for segment in segments for item in segment for unit in item]
    assert flat == units
    assert [len(segment) for segment in segments][:3] == [1, 2, 2]  # the first batch waits for one item
    assert all(len(segment) <= 2 for segment in segments)
    items = [[len(unit.group.rows) for unit in item] for segment in segments for item in segment]
    assert all(sum(rows) >= 12 > sum(rows[:-1]) for rows in items[:-1])
    assert sum(items[-1][:-1]) < 12  # what is left where units end


def test_large_images_make_small_items(units, monkeypatch):
    monkeypatch.setattr(read, "ITEM_BYTES", units[0].group.size)
    assert all(len(item) <= 3 for item in read.cut_items(iter(units)))


def _block(units: list[Unit]) -> pa.Table:
    return read.read_item({"item": [read.pack_item([unit.group for unit in units], None, Patience())]})


def test_a_block_is_cut_back_into_its_units(units):
    item = units[:5]
    cut = list(read.split_block(item, _block(item), Patience()))
    assert [unit for unit, _ in cut] == item
    for unit, table in cut:
        assert tuple(table["id"].to_pylist()) == unit.group.ids


def test_a_block_may_hold_groups_of_a_dataset_and_of_a_pool(units, tmp_path):
    """Both come to one task where their lanes lie side by side."""
    (tmp_path / "1.png").write_bytes(b"1")
    rows = {"id": ["1.png"], "file": ["1.png"], "offset": [0], "size": [1]}
    pq.write_table(pa.table(rows, schema=LINKS_SCHEMA), tmp_path / "part.parquet")
    links = Group(str(tmp_path), "part.parquet", 0, range(1), (), 1, links=str(tmp_path))
    item = [*units[:2], dataclasses.replace(units[2], group=links, order=(0,))]
    tables = [table for _, table in read.split_block(item, _block(item), Patience())]
    assert tables[2].to_pylist() == [{"id": "1.png", "image": b"1"}]
    assert tuple(tables[0]["id"].to_pylist()) == units[0].group.ids


def test_a_block_says_how_often_the_storage_was_asked_again(units, monkeypatch):
    original, answers = storage.resolve, itertools.cycle([True, True, False])

    def flaky(uri: str) -> Any:
        if next(answers):
            raise TimeoutError("no answer")
        return original(uri)

    monkeypatch.setattr(storage, "resolve", flaky)
    monkeypatch.setattr("pipeline.patience.time.sleep", lambda seconds: None)
    item = units[:4]
    patience = Patience()
    task = {"item": [read.pack_item([unit.group for unit in item], None, patience)]}
    for _, table in read.split_block(item, read.read_item(task), patience):
        assert table.column_names == ["id", "image"]
    assert patience.retries == 2 * len(item)


def test_a_block_says_why_its_rows_cannot_be_read(units):
    lost = dataclasses.replace(units[2].group, shard="shards/lost.parquet")
    block = read.read_item({"item": [read.pack_item([units[0].group, lost], None, Patience())]})
    with pytest.raises(UserError, match=r"^\S+/shards/lost\.parquet: not found"):
        list(read.split_block(units[:2], block, Patience()))


def test_a_task_is_as_patient_as_the_worker(units, monkeypatch):
    def away(uri: str) -> Any:
        raise TimeoutError("no answer")

    now = [0.0]
    monkeypatch.setattr(storage, "resolve", away)
    monkeypatch.setattr("pipeline.patience.time.monotonic", lambda: now[0])
    monkeypatch.setattr("pipeline.patience.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pytest.raises(TimeoutError):
        read.read_item({"item": [read.pack_item([units[0].group], None, Patience(7.0))]})
    assert now == [7.0]


def test_a_block_that_is_not_what_was_planned_is_refused(units):
    item = units[:5]
    for block in (_block(item[:4]), _block(item[1:] + item[:1])):
        with pytest.raises(RuntimeError, match="other rows than the index says"):
            list(read.split_block(item, block, Patience()))
    with pytest.raises(RuntimeError, match="were planned"):
        list(read.split_block(item, _block(units[:6]), Patience()))
    group = dataclasses.replace(item[0].group, ids=("x",) * len(item[0].group.ids))
    with pytest.raises(RuntimeError, match=f"{group.shard}, row group"):
        list(read.split_block([dataclasses.replace(item[0], group=group)], _block(item[:1]), Patience()))
