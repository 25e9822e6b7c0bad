"""The order of the images of either side: a pure function of (index, seed, global batch size).

Position j of the global batch is lane j. A lane walks through its own sequence of groups, a permutation of all
groups per epoch dealt out over the lanes, and serves the rows of each in a permuted order. Workers own contiguous
lanes, so who reads changes with their number and what is read does not; any step can be reached by arithmetic.
A plan never looks at all groups: it knows how many there are, how many rows nearly all of them hold, and which do not.

A group of the unlabeled side is a row group. Labeled images are few and come often: each is a group of its own, so an
epoch of theirs is a permutation of images.

Sources of unlabeled images are the dataset's own and pools. Each has a plan of its own over its lanes, so a pool's
order depends on nothing but itself, the seed and how many lanes it has. Opening a pool reads one small file, whatever
its size.

Randomness is keyed by names, never by the order in which threads or workers arrive.
"""

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from pipeline import storage
from pipeline.config.schema import Config
from pipeline.datasets.pools.pool import open_pool
from pipeline.datasets.prepared.dataset import INFO_FILE, Dataset, open_dataset
from pipeline.datasets.prepared.splits import Split
from pipeline.errors import UserError
from pipeline.ingest.groups import Group, GroupTable, PoolTable, select_groups

# ---- keyed randomness -------------------------------------------------------------------------------------------


def key(*parts: object) -> int:
    """A 128-bit key of any printable parts."""
    return int.from_bytes(hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=16).digest(), "little")


def generator(*parts: object) -> np.random.Generator:
    """A generator whose numbers depend on `parts` alone."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


class Permutation:
    """A keyed permutation of range(n) in constant memory: a Feistel network with cycle walking."""

    _ROUNDS = 6

    def __init__(self, n: int, *parts: object) -> None:
        """Args: n: size, at least 1; parts: what the permutation depends on."""
        if n < 1:
            raise ValueError(f"a permutation of {n} items")
        self.n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._mask = np.uint64((1 << self._half) - 1)
        self._keys = generator(*parts).integers(0, 1 << 63, self._ROUNDS, dtype=np.uint64)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Images of `index`, int64 of any shape with values in 0..n-1, as int64.

        Raises:
            ValueError: an index out of range (cycle walking would never end).
        """
        return self._cycled(index, self._walk)

    def inverse(self, index: np.ndarray) -> np.ndarray:
        """The inverse of a call; same arguments, result and errors."""
        return self._cycled(index, self._walk_back)

    def _cycled(self, index: np.ndarray, walk: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Applies the network, a permutation of a power of 4, until every value lies in range(n) (cycle walking)."""
        values = np.asarray(index).astype(np.uint64)
        if values.size and int(values.max()) >= self.n:
            raise ValueError(f"index {int(values.max())} in a permutation of {self.n}")
        values = walk(values)
        while (outside := values >= self.n).any():
            values = np.where(outside, walk(values), values)
        return values.astype(np.int64)

    def _walk(self, values: np.ndarray) -> np.ndarray:
        half = np.uint64(self._half)
        left, right = values >> half, values & self._mask
        for round_key in self._keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & self._mask)
        return (left << half) | right

    def _walk_back(self, values: np.ndarray) -> np.ndarray:
        half = np.uint64(self._half)
        left, right = values >> half, values & self._mask
        for round_key in self._keys[::-1]:
            left, right = right ^ (_mixed(left ^ round_key) & self._mask), left
        return (left << half) | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every output bit depends on every input bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---- lanes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """One visit of a lane to a group."""

    first_step: int
    """The step that needs its first row."""
    lane: int
    epoch: int
    """What views are drawn by: of images that come more than once in an epoch each turn counts as one."""
    group: Group
    order: tuple[int, ...]
    """Positions in `group.rows`, in the order they are served; rows before the start step are left out."""


class Plan(Protocol):
    """Which sample stands at lane j of step t."""

    def units(self, lanes: Sequence[int], start: int) -> Iterator[Unit]:
        """Endless visits of `lanes` from step `start` on, in the order in which their rows are needed."""
        ...


class LanePlan:
    """The plan of one table of groups."""

    def __init__(self, groups: GroupTable, lanes: int, seed: int, name: str = "groups") -> None:
        """Args: groups: what to serve, not empty; lanes: global batch size; seed, name: the order depends on them."""
        if not len(groups):
            raise ValueError("a plan without row groups")
        self.groups = groups
        self.lanes = lanes
        self.seed = seed
        self._name = name

    def units(self, lanes: Sequence[int], start: int) -> Iterator[Unit]:
        """See `Plan`."""
        begins = self._seek(lanes, start)
        visits = (self._lane(lane, start, *begins[lane]) for lane in lanes)
        return heapq.merge(*visits, key=lambda unit: (unit.first_step, unit.lane))

    def _lane(self, lane: int, start: int, position: int, step: int) -> Iterator[Unit]:
        while True:
            epoch, number = divmod(position, len(self.groups))
            group = self.groups[int(self._permutation(epoch)(np.array([number]))[0])]
            order = generator(self.seed, "rows", epoch, group.keyed or group.shard, group.row_group).permutation(
                len(group.rows)
            )
            skip = max(0, start - step)
            served = tuple(int(i) for i in order[skip:])
            turn, turns = group.turn
            yield Unit(step + skip, lane, epoch * turns + turn, group, served)
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
        return Permutation(len(self.groups), self.seed, self._name, epoch)


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


# ---- sources ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source:
    """One origin of unlabeled images."""

    name: str
    """The URI of a pool, or `own images`."""
    groups: GroupTable
    images: int
    """How many there are."""
    weight: float
    """Its share of the lanes, relative to the others'; above 0."""
    generations: int
    """How many generations of the pool count; 0 for the dataset's own images."""
    digest: str
    """Hash of what the source holds."""
    made_of: tuple[tuple[int, ...], tuple[tuple[float, float], ...]] = ((), ())
    """Bands and ranges of its images; empty: they are RGB."""


def open_sources(config: Config, dataset: Dataset, split: Split) -> list[Source]:
    """The unlabeled sources of a run: the dataset's own images first, then the pools.

    The own images are left out if pools are named and every one of them is labeled too (split `full`), or if their
    weight is 0.

    Raises:
        UserError: a pool cannot be used, lacks a generation that the run began with, or has images of other bands.
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
        if found[-1].made_of != (dataset.info.bands, dataset.info.ranges):
            raise UserError(
                f"data.unlabeled_pools: images of {uri} are of other bands or ranges than those of {dataset.root}; "
                "prepare both with the same --bands and --range, or neither"
            )
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
        info, groups = dataset.info, select_groups(dataset, ids)
        made_of = (info.bands, info.ranges)
        return Source(uri, groups, len(ids), weight or len(ids), 1, info.index_hash[:12], made_of)
    pool = open_pool(uri)
    there = len(pool.info.generations)
    generations = generations or there
    if generations > there:
        raise UserError(f"{uri}: has {there} generations, the run began with {generations}; use --fresh")
    images = pool.images(generations)
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
        self.source_of = _spread(shares)
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
        every = [lane for lane, source in enumerate(self.source_of) if source == number]
        ours = [inner for inner, lane in enumerate(every) if lane in lanes]
        for unit in self._plans[number].units(ours, start):
            yield replace(unit, lane=every[unit.lane])
