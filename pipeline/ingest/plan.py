"""The order of the unlabeled stream: lanes, a pure function of (index, seed, global batch size).

Position j of the global batch is lane j. A lane walks through its own sequence of row groups, a permutation of all
groups per epoch dealt out over the lanes, and serves the rows of each in a permuted order. Workers own contiguous
lanes, so who reads changes with their number and what is read does not; any step can be reached by arithmetic.
A plan never looks at all groups: it knows how many there are, how many rows nearly all of them hold, and which do not.
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.datasets.format import Dataset
from pipeline.ingest.randomness import Permutation, generator


@dataclass(frozen=True)
class Group:
    """The rows of one row group that the stream serves."""

    root: str
    shard: str
    row_group: int
    rows: Sequence[int]
    """Positions inside the row group, ascending."""
    ids: tuple[str, ...]
    """Sample ids of these rows."""
    size: int
    """Encoded bytes of these rows."""


@dataclass(frozen=True)
class Unit:
    """One visit of a lane to a group."""

    first_step: int
    """The step that needs its first row."""
    lane: int
    epoch: int
    group: Group
    order: tuple[int, ...]
    """Positions in `group.rows`, in the order they are served; rows before the start step are left out."""


class GroupTable(Protocol):
    """The row groups that a plan orders, by number; each is made when it is asked for."""

    rows: int
    """Rows of every group that is not in `short`."""
    short: np.ndarray
    """int64 [n]: numbers of the groups with fewer rows."""
    counts: np.ndarray
    """int64 [n]: the rows of those, at least 1."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Group: ...


class GroupList(list[Group]):
    """A table of groups that are all at hand."""

    def __init__(self, groups: Iterable[Group]) -> None:
        super().__init__(groups)
        counts = np.array([len(group.rows) for group in self], np.int64)
        self.rows = int(counts.max(initial=0))
        self.short = np.flatnonzero(counts < self.rows)
        self.counts = counts[self.short]


def select_groups(dataset: Dataset, ids: Sequence[str]) -> GroupList:
    """The row groups that hold `ids`, with those rows alone, in the order of the index."""
    wanted = set(ids)
    found: dict[tuple[str, int], list[tuple[int, str, int]]] = {}
    columns = ("id", "shard", "row_group", "row", "image_bytes")
    for name, shard, group, row, size in zip(*(dataset.index[c].to_pylist() for c in columns), strict=True):
        if name in wanted:
            found.setdefault((shard, group), []).append((row, name, size))
    groups = []
    for (shard, number), members in found.items():
        rows, names, sizes = zip(*sorted(members), strict=True)
        groups.append(Group(dataset.root, shard, number, rows, names, sum(sizes)))
    return GroupList(groups)


class LanePlan:
    """Which sample stands at lane j of step t."""

    def __init__(self, groups: GroupTable, lanes: int, seed: int) -> None:
        """Args: groups: what to serve, not empty; lanes: global batch size; seed: of the order."""
        if not len(groups):
            raise ValueError("a plan without row groups")
        self.groups = groups
        self.lanes = lanes
        self.seed = seed

    def units(self, lanes: Sequence[int], start: int) -> Iterator[Unit]:
        """Endless visits of `lanes` from step `start` on, in the order in which their rows are needed."""
        begins = self._seek(lanes, start)
        visits = (self._lane(lane, start, *begins[lane]) for lane in lanes)
        return heapq.merge(*visits, key=lambda unit: (unit.first_step, unit.lane))

    def _lane(self, lane: int, start: int, position: int, step: int) -> Iterator[Unit]:
        while True:
            epoch, number = divmod(position, len(self.groups))
            group = self.groups[int(self._permutation(epoch)(np.array([number]))[0])]
            order = generator(self.seed, "rows", epoch, group.shard, group.row_group).permutation(len(group.rows))
            skip = max(0, start - step)
            served = tuple(int(i) for i in order[skip:])
            yield Unit(step + skip, lane, epoch, group, served)
            step += len(order)
            position += self.lanes

    def _seek(self, lanes: Sequence[int], start: int) -> dict[int, tuple[int, int]]:
        """The unit in which each lane serves its row `start`, and the lane's step at that unit's first row.

        Counted as if all groups were full, less what the short ones lack: nothing here grows with the table.
        """
        table, found, ahead = self.groups, {}, {lane: (lane, 0) for lane in lanes}
        lacks, epoch = table.rows - table.counts, 0
        while ahead:
            first, end = epoch * len(table), (epoch + 1) * len(table)
            places = first + self._permutation(epoch).inverse(table.short)
            for lane, (position, step) in list(ahead.items()):
                ours = places % self.lanes == lane
                visits = _Visits(table.rows, places[ours] // self.lanes - position // self.lanes, lacks[ours])
                units = len(range(position, end, self.lanes))
                if step + visits.rows(units) > start:
                    unit = bisect_right(range(units), start - step, key=visits.rows) - 1
                    found[lane] = (position + unit * self.lanes, step + visits.rows(unit))
                    del ahead[lane]
                else:
                    ahead[lane] = (position + units * self.lanes, step + visits.rows(units))
            epoch += 1
        return found

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(len(self.groups), self.seed, "groups", epoch)


class _Visits:
    """How many rows a lane has served before its k-th unit of an epoch."""

    def __init__(self, rows: int, short: np.ndarray, lacks: np.ndarray) -> None:
        """Args: rows: of a full unit; short: which units are not, in any order; lacks: how many rows they lack."""
        order = np.argsort(short)
        self._rows, self._short = rows, short[order]
        self._lacking = np.concatenate([[0], lacks[order].cumsum()])

    def rows(self, units: int) -> int:
        """Rows of the first `units` units."""
        return self._rows * units - int(self._lacking[np.searchsorted(self._short, units)])


def owned_lanes(lanes: int, rank: int, world: int) -> range:
    """The lanes of one rank: contiguous, equally many for each.

    Raises:
        ValueError: the global batch does not divide among the ranks.
    """
    if lanes % world:
        raise ValueError(f"{lanes} lanes over {world} ranks")
    share = lanes // world
    return range(rank * share, (rank + 1) * share)
