from collections import Counter
from itertools import islice

import pytest

from pipeline.datasets.format import open_dataset
from pipeline.ingest.plan import Group, LanePlan, owned_lanes, select_groups

UNEQUAL = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def _groups(sizes: list[int]) -> list[Group]:
    return [
        Group("root", f"shard{n}", n, tuple(range(size)), tuple(f"{n}.{row}" for row in range(size)), 100 * size)
        for n, size in enumerate(sizes)
    ]


def _served(plan: LanePlan, lanes: range, start: int, steps: int) -> dict[int, list[tuple[int, str]]]:
    """(epoch, id) by lane, from `start` to `start + steps`."""
    found: dict[int, list[tuple[int, str]]] = {lane: [] for lane in lanes}
    for unit in plan.units(lanes, start):
        if unit.first_step >= start + steps:
            break
        assert unit.first_step == start + len(found[unit.lane])
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
        LanePlan([], 4, 0)


def test_groups_hold_the_wanted_rows_alone(shapes):
    dataset = open_dataset(shapes)
    rows = {row["id"]: row for row in dataset.index.to_pylist()}
    wanted = dataset.subset("train")["id"].to_pylist()[5:300:7]
    groups = select_groups(dataset, wanted)
    assert sorted(name for group in groups for name in group.ids) == sorted(wanted)
    assert len({(group.shard, group.row_group) for group in groups}) == len(groups)
    for group in groups:
        assert list(group.rows) == sorted(group.rows)
        assert group.size == sum(rows[name]["image_bytes"] for name in group.ids)
        for row, name in zip(group.rows, group.ids, strict=True):
            assert (rows[name]["shard"], rows[name]["row_group"], rows[name]["row"]) == (
                group.shard, group.row_group, row,
            )  # fmt: skip
