"""The unlabeled sources of a run: the dataset's own images and pools, and which lanes each of them serves.

Each source has a plan of its own over its lanes, so a pool's order depends on nothing but itself, the seed and how
many lanes it has. Opening a pool reads one small file, whatever its size.
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline import storage
from pipeline.config import Config
from pipeline.datasets.format import INFO_FILE, Dataset, open_dataset
from pipeline.datasets.pools import Pool, open_pool, part_name
from pipeline.datasets.splits import Split
from pipeline.errors import UserError
from pipeline.ingest.plan import Group, GroupTable, LanePlan, Unit, select_groups
from pipeline.ingest.randomness import key


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
            self._pool.root, part_name(index, part), row_group, range(rows), (),
            rows * generation.bytes // generation.rows, info.root if info.kind == "links" else None,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Source:
    """One origin of unlabeled images."""

    name: str
    """The URI of a pool, or what the dataset's own images are called."""
    groups: GroupTable
    images: int
    """How many there are."""
    weight: float
    """Its share of the lanes, relative to the others'; above 0."""
    generations: int
    """How many generations of the pool count; 0 for the dataset's own images."""
    digest: str
    """Tells these images from others."""


def open_sources(config: Config, dataset: Dataset, split: Split) -> list[Source]:
    """The unlabeled sources of a run: the dataset's own images first, then the pools.

    The own images are left out if pools are named and every one of them is labeled too (split `full`), or if their
    weight is 0.

    Raises:
        UserError: a pool cannot be used, or lacks a generation that the run began with.
    """
    data = config.data
    weights = data.pool_weights or (None,) * (1 + len(data.unlabeled_pools))
    pinned = data.pool_generations or (None,) * len(data.unlabeled_pools)
    found = []
    if weights[0] != 0 and not (data.unlabeled_pools and set(split.unlabeled) <= set(split.labeled)):
        own, images = select_groups(dataset, split.unlabeled), len(split.unlabeled)
        found.append(Source("own images", own, images, weights[0] or images, 0, split.digest))
    for uri, weight, generations in zip(data.unlabeled_pools, weights[1:], pinned, strict=True):
        found.append(open_source(uri, weight, generations))
    return found


def open_source(uri: str, weight: float | None = None, generations: int | None = None) -> Source:
    """Opens a pool, or a prepared dataset whose train images are taken.

    Args:
        uri: of the pool.
        weight: see `Source`; None: the number of images.
        generations: how many of its generations count; None: all that are there.

    Raises:
        UserError: neither is there, or it has fewer generations.
    """
    if storage.exists(storage.join(uri, INFO_FILE)):
        dataset = open_dataset(uri)
        ids = dataset.subset("train")["id"].to_pylist()
        return Source(uri, select_groups(dataset, ids), len(ids), weight or len(ids), 1, dataset.info.index_hash[:12])
    pool = open_pool(uri)
    there = len(pool.info.generations)
    generations = generations or there
    if generations > there:
        raise UserError(f"{uri}: has {there} generations, the run began with {generations}; use --fresh")
    images = sum(each.rows for each in pool.info.generations[:generations])
    return Source(uri, PoolTable(pool, generations), images, weight or images, generations, pool.digest(generations))


def share_lanes(sources: Sequence[Source], lanes: int) -> list[int]:
    """Lanes per source, by weight: largest remainder, but at least one each.

    Raises:
        UserError: more sources than lanes, or a source with fewer images than it has lanes.
    """
    if len(sources) > lanes:
        raise UserError(
            f"{len(sources)} unlabeled sources but optim.batch_unlabeled {lanes}: each needs one image a step"
        )
    total = sum(source.weight for source in sources)
    shares = [1] * len(sources)
    for _ in range(lanes - len(sources)):
        lacking = [lanes * source.weight / total - share for source, share in zip(sources, shares, strict=True)]
        shares[int(np.argmax(lacking))] += 1
    for source, share in zip(sources, shares, strict=True):
        if source.images < share:
            raise UserError(
                f"{source.name}: {source.images} unlabeled images, fewer than its {share} of optim.batch_unlabeled "
                f"{lanes}: take a smaller batch, more data.unlabeled_pools, or other data.pool_weights"
            )
    return shares


def _spread(shares: Sequence[int]) -> list[int]:
    """The source of each lane, evenly mixed, so that every worker reads from all of them."""
    lanes, given, order = sum(shares), [0] * len(shares), []
    for lane in range(1, lanes + 1):
        lacking = [share * lane - lanes * had for share, had in zip(shares, given, strict=True)]
        order.append(lacking.index(max(lacking)))
        given[order[-1]] += 1
    return order


class Mixture:
    """The plans of several sources as one."""

    def __init__(self, sources: Sequence[Source], lanes: int, seed: int) -> None:
        """Args: sources: at least one; lanes: global batch size; seed: of the order.

        Raises:
            UserError: see `share_lanes`.
        """
        shares = share_lanes(sources, lanes)
        self._source_of = _spread(shares)
        self._plans = [
            LanePlan(source.groups, share, key(seed, "pool", number) if number else seed)
            for number, (source, share) in enumerate(zip(sources, shares, strict=True))
        ]

    def units(self, lanes: Sequence[int], start: int) -> Iterator[Unit]:
        """See `Plan`."""
        return heapq.merge(
            *(self._units_of(number, lanes, start) for number in range(len(self._plans))),
            key=lambda unit: (unit.first_step, unit.lane),
        )

    def _units_of(self, number: int, lanes: Sequence[int], start: int) -> Iterator[Unit]:
        every = [lane for lane, source in enumerate(self._source_of) if source == number]
        ours = [inner for inner, lane in enumerate(every) if lane in lanes]
        for unit in self._plans[number].units(ours, start):
            yield replace(unit, lane=every[unit.lane])
