import hashlib
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.ingest.groups import Group, select_groups
from pipeline.ingest.order import LanePlan, owned_lanes
from tests.groups import GroupList

UNEQUAL = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def _groups(sizes: list[int]) -> GroupList:
    return GroupList(
        Group("root", f"shard{n}", n, tuple(range(size)), tuple(f"{n}.{row}" for row in range(size)), 100 * size)
        for n, size in enumerate(sizes)
    )


def _served(plan: LanePlan, lanes: range, start: int, steps: int) -> dict[int, list[tuple[int, str]]]:
    """(epoch, id) by lane, from `start` to `start + steps`."""
    found: dict[int, list[tuple[int, str]]] = {lane: [] for lane in lanes}
    for unit in plan.units(lanes, start):
        if unit.first_step >= start + steps:
            break
        assert unit.first_step == start + len(found[unit.lane])
        assert unit.group.ids is not None
        found[unit.lane] += [(unit.epoch, unit.group.ids[row]) for row in unit.order]
    return {lane: rows[:steps] for lane, rows in found.items()}


@pytest.mark.parametrize("sizes", [[4] * 12, UNEQUAL, [7], [1, 2]])
@pytest.mark.parametrize("lanes", [1, 4, 6])
def test_every_row_once_per_epoch(sizes, lanes):
    plan = LanePlan(_groups(sizes), lanes, seed=0)
    served = _served(plan, range(lanes), 0, 8 * sum(sizes))
    counts = Counter(row for rows in served.values() for row in rows)
    assert set(counts.values()) == {1}
    for epoch in range(3):
        assert len([row for row in counts if row[0] == epoch]) == sum(sizes)


@pytest.mark.parametrize("sizes", [[4] * 12, UNEQUAL])
def test_it_goes_on_at_any_step_with_any_owners(sizes):
    whole = _served(LanePlan(_groups(sizes), 6, seed=0), range(6), 0, 141)
    for start in [0, 3, 4, 48, 101]:
        for world in (1, 2, 3):
            for rank in range(world):
                served = _served(LanePlan(_groups(sizes), 6, seed=0), owned_lanes(6, rank, world), start, 40)
                for lane, rows in served.items():
                    assert rows == whole[lane][start : start + 40]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("sizes", [[3] * 20 + [1], UNEQUAL, [5, 2], [6]])
def test_the_global_sequence_is_the_same_for_all_numbers_of_workers(sizes, world):
    """Also after many epochs, and with fewer groups than lanes."""
    whole = _served(LanePlan(_groups(sizes), 8, seed=3), range(8), 0, 60)
    for start in (1, 13, 50):
        for rank in range(world):
            plan = LanePlan(_groups(sizes), 8, seed=3)
            for lane, rows in _served(plan, owned_lanes(8, rank, world), start, 10).items():
                assert rows == whole[lane][start : start + 10]


def test_the_order_of_earlier_versions_stays():
    """A run that is resumed with a new version goes on in its own order; digests made by version 0.1.0."""
    known = {0: "7da71e918531fe5f", 7: "52e028be23e07b5c", 100: "4c94bff989062cd1", 5000: "16e9e2477b3d1921"}
    for start, expected in known.items():
        units = islice(LanePlan(_groups(UNEQUAL), 6, 0).units(range(6), start), 60)
        told = [(unit.first_step, unit.lane, unit.epoch, unit.group.shard, unit.order) for unit in units]
        assert hashlib.sha256(repr(told).encode()).hexdigest()[:16] == expected


class _Endless:
    """A table of any length, which counts what it is asked for."""

    def __init__(self, length: int) -> None:
        self.rows, self.short, self.counts = 64, np.array([length - 1]), np.array([5])
        self.length, self.asked = length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Group:
        self.asked += 1
        rows = 5 if number == self.length - 1 else 64
        return Group("root", f"shard{number // 8}", number % 8, range(rows), (), 64)


@pytest.mark.parametrize("start", [0, 10**5 + 1])
def test_a_million_shards_cost_what_a_thousand_do(start):
    peaks = []
    for shards in (10**3, 10**4, 10**5, 10**6):
        table = _Endless(8 * shards)
        tracemalloc.start()
        units = list(islice(LanePlan(table, 16, 0).units(range(16), start), 32))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert table.asked <= 32 + 16  # what is given out, and the next one of each lane
        assert units[0].first_step == start
    assert max(peaks[1:]) < 1.5 * peaks[0] + 10_000  # the first one also meets cold caches


def test_units_come_in_order_of_need():
    units = list(islice(LanePlan(_groups(UNEQUAL), 4, seed=1).units(range(4), 5), 100))
    assert [unit.first_step for unit in units] == sorted(unit.first_step for unit in units)
    assert all(unit.order for unit in units)


def test_order_changes_with_seed_and_epoch():
    def rows(seed: int) -> list[tuple[int, str]]:
        return _served(LanePlan(_groups([8] * 6), 1, seed), range(1), 0, 144)[0]

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)
    epochs = [[name for epoch, name in rows(0) if epoch == number] for number in range(3)]
    groups = [[name.partition(".")[0] for name in epoch[::8]] for epoch in epochs]
    assert groups[0] != groups[1] != groups[2]
    rows_of = [[name for name in epoch if name.startswith("0.")] for epoch in epochs]
    assert rows_of[0] != rows_of[1] != rows_of[2]
    assert epochs[0][:8] != sorted(epochs[0][:8])


def test_lanes_are_contiguous_and_equal():
    assert [list(owned_lanes(6, rank, 3)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="6 lanes over 4 ranks"):
        owned_lanes(6, 0, 4)
    with pytest.raises(ValueError, match="without row groups"):
        LanePlan(GroupList([]), 4, 0)


def test_groups_hold_the_wanted_rows_alone(shapes):
    dataset = open_dataset(shapes)
    rows = {row["id"]: row for row in dataset.index.to_pylist()}
    wanted = dataset.subset("train")["id"].to_pylist()[5:300:7]
    groups = select_groups(dataset, wanted)
    assert sorted(name for group in groups for name in group.ids or ()) == sorted(wanted)
    assert len({(group.shard, group.row_group) for group in groups}) == len(groups)
    for group in groups:
        assert group.ids is not None
        assert list(group.rows) == sorted(group.rows)
        assert group.size == sum(rows[name]["image_bytes"] for name in group.ids)
        for row, name in zip(group.rows, group.ids, strict=True):
            assert (rows[name]["shard"], rows[name]["row_group"], rows[name]["row"]) == (
                group.shard, group.row_group, row,
            )  # fmt: skip
