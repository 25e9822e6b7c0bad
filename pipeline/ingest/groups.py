"""The row groups that a plan orders, and where their rows lie: of a prepared dataset, and of a pool.

A table makes each group on demand. What it holds itself does not grow with a pool, and is a number a row of a dataset.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.pools.pool import Pool, part_name
from pipeline.datasets.prepared.dataset import Dataset, Place

UNLABELED, LABELED = ("image",), ("image", "mask")
"""The columns that each side asks for."""


@dataclass(frozen=True)
class Group:
    """The rows of one row group that the stream serves."""

    root: str
    shard: str
    row_group: int
    rows: Sequence[int]
    """Positions inside the row group, ascending."""
    ids: tuple[str, ...]
    """Sample ids of these rows. Empty for a pool, whose ids are known only when rows are read."""
    size: int
    """Encoded bytes of these rows, approximately."""
    columns: tuple[str, ...] = UNLABELED
    """What is read of each row: never the mask of an unlabeled one."""
    places: tuple[tuple[Place, ...], ...] = ()
    """Where that lies in the shard, by column and row. Empty where no index says it: the row group is read."""
    links: str | None = None
    """Where the images lie, if the row group holds links to them."""
    keyed: str = ""
    """What the order of its rows depends on in place of `shard`, if it may lie in other folders."""
    turn: tuple[int, int] = (0, 1)
    """Which of how many turns an epoch this one is, for images that come more than once: the views differ."""

    @property
    def copied(self) -> bool:
        """Whether prepare copied the images of a pool: what it had to leave out has no bytes."""
        return not self.ids and self.links is None


class GroupTable(Protocol):
    """The row groups that a plan orders, by number. Each is made on demand."""

    rows: int
    """Rows of every group that is not in `short`."""
    short: np.ndarray
    """int64 [n]: numbers of the groups with fewer rows."""
    counts: np.ndarray
    """int64 [n]: the rows of those, at least 1."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Group: ...


class IndexTable(Sequence[Group]):
    """Rows of a dataset's index as groups; see `GroupTable`."""

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        starts: np.ndarray,
        columns: tuple[str, ...],
        turns: np.ndarray | None = None,
    ) -> None:
        """Makes a table.

        Args:
            dataset: an open dataset.
            rows: int64 [n], of its index; those of a group follow each other, in stored order.
            starts: int64 [groups], where in `rows` each group begins.
            columns: what is read of them.
            turns: int64 [groups], how often each came before, if some come more than once.
        """
        self._turns, self._most = turns, 1 if turns is None else 1 + int(turns.max())
        self._dataset, self._index_rows, self._columns = dataset, rows, columns
        self._bounds = np.append(starts, len(rows))
        counts = np.diff(self._bounds)
        self.rows = int(counts.max(initial=0))
        self.short = np.flatnonzero(counts < self.rows)
        self.counts = counts[self.short]

    @property
    def size(self) -> int:
        """Bytes of all that is to be read."""
        columns = (self._dataset.index[f"{column}_bytes"].to_numpy() for column in self._columns)
        return sum(int(sizes[self._index_rows].sum()) for sizes in columns)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, number: int) -> Group:  # pyright: ignore[reportIncompatibleMethodOverride] # no slices
        if not 0 <= number < len(self):
            raise IndexError(number)
        taken = self._dataset.index.take(self._index_rows[self._bounds[number] : self._bounds[number + 1]]).to_pydict()
        sizes = [taken[f"{column}_bytes"] for column in self._columns]
        places = tuple(
            tuple(map(Place, taken[f"{column}_at"], each, taken[f"{column}_crc"]))
            for column, each in zip(self._columns, sizes, strict=True)
            if self._dataset.located
        )
        return Group(
            self._dataset.root, taken["shard"][0], taken["row_group"][0], tuple(taken["row"]), tuple(taken["id"]),
            sum(map(sum, sizes)), self._columns, places,
            turn=(0 if self._turns is None else int(self._turns[number]), self._most),
        )  # fmt: skip


def select_groups(dataset: Dataset, ids: Sequence[str], columns: tuple[str, ...] = UNLABELED) -> IndexTable:
    """The row groups that hold `ids`, with those rows alone, in the order of the index."""
    rows = _named(dataset, ids)["row"].to_numpy()
    shards, groups = (dataset.index[name].take(rows) for name in ("shard", "row_group"))
    codes = shards.combine_chunks().dictionary_encode().indices.to_numpy()
    new = (np.diff(codes, prepend=-1) != 0) | (np.diff(groups.to_numpy(), prepend=-1) != 0)
    return IndexTable(dataset, rows, np.flatnonzero(new), columns)


def select_images(
    dataset: Dataset, ids: Sequence[str], columns: tuple[str, ...], times: np.ndarray | None = None
) -> IndexTable:
    """`ids` as groups of one row each, by id: a plan of these permutes images.

    Args:
        dataset: an open dataset.
        ids: of images.
        columns: what is read of them.
        times: int64 [n], how often each comes in an epoch, by id; None: once.
    """
    rows = _named(dataset, ids).sort_by("id")["row"].to_numpy()
    if times is None:
        return IndexTable(dataset, rows, np.arange(len(rows)), columns)
    turns = np.concatenate([np.arange(count) for count in times])
    return IndexTable(dataset, rows.repeat(times), np.arange(times.sum()), columns, turns)


def balanced(dataset: Dataset, ids: Sequence[str], balance: float, rng: np.random.Generator) -> np.ndarray:
    """How often each image comes in an epoch, int64 [n] by id: repeat factor sampling.

    An image comes max(1, max over its classes c of sqrt(balance / f_c)) times, f_c the share of `ids` that show c
    (Gupta et al. 2019, LVIS). A fraction is left to chance once, not anew in each epoch.

    Args:
        dataset: one whose index says which classes masks show.
        ids: of images with a mask.
        balance: in 0..1.
        rng: decides on fractions.
    """
    rows = _named(dataset, ids).sort_by("id")["row"].to_numpy()
    lists = dataset.index["classes"].take(rows).combine_chunks()
    found, images = lists.flatten().to_numpy(), np.arange(len(lists)).repeat(lists.value_lengths().to_numpy())
    shares = np.bincount(found, minlength=256) / len(lists)
    wanted = np.ones(len(lists))
    np.maximum.at(wanted, images, np.sqrt(balance / shares[found]))
    return (wanted + rng.random(len(lists))).astype(np.int64)


def _named(dataset: Dataset, ids: Sequence[str]) -> pa.Table:
    """`id` and `row`, the place in the index, of the rows that `ids` name, in the order of the index."""
    rows = pa.table({"id": dataset.index["id"], "row": np.arange(len(dataset.index))})
    return rows.filter(pc.field("id").isin(pa.array(ids, pa.string())))


class PoolTable:
    """The row groups of a pool's first generations; see `GroupTable`."""

    def __init__(self, pool: Pool, generations: int) -> None:
        """Args: pool: an open pool; generations: how many of its generations count, at least 1."""
        self._pool, self._counted = pool, pool.info.generations[:generations]
        self.rows = pool.info.group_rows
        self._ends = np.cumsum([-(-each.rows // self.rows) for each in self._counted])
        rest = np.array([each.rows % self.rows for each in self._counted])
        self.short, self.counts = self._ends[rest > 0] - 1, rest[rest > 0]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Group:
        index = bisect_right(self._ends, number)
        generation, info = self._counted[index], self._pool.info
        place = number - (int(self._ends[index - 1]) if index else 0)
        rows = min(self.rows, generation.rows - place * self.rows)
        part, row_group = divmod(place, info.groups_per_shard)
        return Group(
            self._pool.root, part_name(info.first + index, part), row_group, range(rows), (),
            rows * generation.bytes // generation.rows, links=info.root if info.kind == "links" else None,
            keyed=part_name(index, part),
        )  # fmt: skip
