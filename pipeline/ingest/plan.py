"""The order of the unlabeled stream: lanes, a pure function of (index, seed, global batch size).

Position j of the global batch is lane j. A lane walks through its own sequence of row groups, a permutation of all
groups per epoch dealt out over the lanes, and serves the rows of each in a permuted order. Workers own contiguous
lanes, so who reads changes with their number and what is read does not; any step can be reached by arithmetic.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.datasets.format import Dataset
from pipeline.ingest.randomness import Permutation, generator


@dataclass(frozen=True)
class Group:
    """The rows of one row group that the stream serves."""

    root: str
    shard: str
    row_group: int
    rows: tuple[int, ...]
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


def select_groups(dataset: Dataset, ids: Sequence[str]) -> list[Group]:
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
    return groups


class LanePlan:
    """Which sample stands at lane j of step t."""

    def __init__(self, groups: Sequence[Group], lanes: int, seed: int) -> None:
        """Args: groups: what to serve, not empty; lanes: global batch size; seed: of the order."""
        if not groups:
            raise ValueError("a plan without row groups")
        self.groups = list(groups)
        self.lanes = lanes
        self.seed = seed
        self._counts = np.array([len(group.rows) for group in groups])

    def units(self, lanes: Sequence[int], start: int) -> Iterator[Unit]:
        """Endless visits of `lanes` from step `start` on, in the order in which their rows are needed."""
        return heapq.merge(*(self._lane(lane, start) for lane in lanes), key=lambda unit: (unit.first_step, unit.lane))

    def _lane(self, lane: int, start: int) -> Iterator[Unit]:
        position, step = self._seek(lane, start)
        while True:
            epoch, number = divmod(position, len(self.groups))
            group = self.groups[int(self._permutation(epoch)(np.array([number]))[0])]
            order = generator(self.seed, "rows", epoch, group.shard, group.row_group).permutation(len(group.rows))
            skip = max(0, start - step)
            served = tuple(int(i) for i in order[skip:])
            yield Unit(step + skip, lane, epoch, group, served)
            step += len(order)
            position += self.lanes

    def _seek(self, lane: int, start: int) -> tuple[int, int]:
        """The unit that holds row `start` of a lane, and the lane's step at that unit's first row."""
        step, total = 0, len(self.groups)
        position = lane
        while True:
            epoch = position // total
            positions = np.arange(position, (epoch + 1) * total, self.lanes)
            ends = step + self._counts[self._permutation(epoch)(positions % total)].cumsum()
            passed = int(np.searchsorted(ends, start, side="right"))
            if passed < len(positions):
                return int(positions[passed]), int(ends[passed - 1]) if passed else step
            position, step = int(positions[-1]) + self.lanes, int(ends[-1])

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(len(self.groups), self.seed, "groups", epoch)


def owned_lanes(lanes: int, rank: int, world: int) -> range:
    """The lanes of one rank: contiguous, equally many for each.

    Raises:
        ValueError: the global batch does not divide among the ranks.
    """
    if lanes % world:
        raise ValueError(f"{lanes} lanes over {world} ranks")
    share = lanes // world
    return range(rank * share, (rank + 1) * share)
