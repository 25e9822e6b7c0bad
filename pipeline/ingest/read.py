"""Reading the samples of a step, labeled or unlabeled: the units of a plan as a stream.

Units are read inline, or on the cluster through Ray Data in bounded segments. One interface: `read(units) -> (unit,
table)` in the order of the units, the table holding `id` and the columns of the unit's group. Those of the unlabeled
side are `image` alone, so no method can see an unlabeled mask; what a network saw in the images, its pseudo-labels,
comes from files of their own.

A labeled set that is small comes again and again: it is read once, into the object store of Ray, where the workers of a
node share it. The plan is the same, so the order is, too.
"""

import logging
import pickle
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.cluster.connect import quiet_data
from pipeline.datasets.pools.pool import FETCHES, LINKS_SCHEMA, fetch
from pipeline.datasets.prepared.dataset import SHARD_SCHEMA, Dataset, read_group, read_places
from pipeline.datasets.prepared.pseudo import read_labels
from pipeline.errors import UserError
from pipeline.ingest.groups import LABELED, UNLABELED, Group, select_groups
from pipeline.ingest.order import Plan, Unit
from pipeline.patience import Patience

log = logging.getLogger(__name__)

# ---- units of a plan --------------------------------------------------------------------------------------------


class Reader(Protocol):
    """How a stream is read."""

    def __call__(
        self, units: Iterable[Unit], labels: str | None, patience: Patience
    ) -> Iterator[tuple[Unit, pa.Table]]:
        """Reads `id`, the group's columns, and `label` if pseudo-labels are named; counts trouble in `patience`."""
        ...


ITEM_BYTES = 24 << 20
"""Encoded bytes that one Ray task reads. A task costs about 60 ms of CPU whatever it reads."""
ITEM_ROWS = 512
READ_CPUS = 0.25
"""CPUs that a read task reserves: it mostly waits."""
DECODE_CPUS = 1.0
"""CPUs that a decoding task reserves."""
SEGMENT_ITEMS = 4
"""Items per Ray Data execution. The object store holds two segments at a time. The first segments are smaller, so that
the first batch waits for one item and a short run reads less ahead."""
SPARE = {UNLABELED: 1.0, LABELED: 0.2}
"""Bytes between images of a row group that may be read with them, as a share of theirs. Of the unlabeled side most are
wanted, and one request is worth more than bytes; a labeled split may be a sixteenth."""
HELD_BYTES = 1 << 30
"""A labeled set of at most so many encoded bytes is held, a larger one streams."""
_PROBLEM = "problem"
"""Name of the only column of a block that reports an error instead of rows."""
_RETRIES = "retries"
"""Name of the column in which a block carries home how often its task had to ask again; the same on every row."""


def read_inline(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
    """Reads in this thread, without Ray: the reference order, for tests and single processes."""
    for unit in units:
        yield unit, read_rows(unit.group, labels, patience)


def read_ray(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
    """Reads through a chain of small Ray Data executions, the next one started when the one before is consumed.

    A long execution must not stay open behind a slow consumer: once its budget is full, Ray Data's scheduling thread
    spins. A segment is bounded, so its execution ends by itself and its blocks wait in the object store.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="segment") as pool:
        executions = (pool.submit(_execute, segment, labels, patience) for segment in cut_segments(iter(units)))
        pending = next(executions, None)
        while pending is not None:
            segment, blocks = pending.result()
            pending = next(executions, None)
            for items, block in zip(segment, blocks, strict=True):
                yield from split_block(items, block, patience)


def read_rows(group: Group, labels: str | None, patience: Patience) -> pa.Table:
    """`id` and the columns of a group, and `label` if a place of pseudo-labels is named.

    Raises:
        UserError: missing or damaged, fewer rows than planned, an image without a label, or the storage refuses.
    """
    table = _located(group, patience) if group.places else _read(group, patience)
    if labels is None:
        return table
    return table.append_column("label", read_labels(labels, group.shard, group.row_group, group.ids, patience))


def _located(group: Group, patience: Patience) -> pa.Table:
    """The rows of a group whose places are known, and little more."""
    places, names = list(chain(*group.places)), group.ids * len(group.columns)
    files = read_places(storage.join(group.root, group.shard), places, names, SPARE[group.columns], patience)
    count = len(group.rows)
    columns = [pa.array(files[start : start + count], pa.binary()) for start in range(0, len(files), count)]
    schema = pa.schema([SHARD_SCHEMA.field(name) for name in ("id", *group.columns)])
    return pa.table([pa.array(group.ids, pa.string()), *columns], schema=schema)


def _read(group: Group, patience: Patience) -> pa.Table:
    """The rows of a group out of the whole row group."""
    columns = ["id", *group.columns] if group.links is None else LINKS_SCHEMA.names
    table = read_group(group.root, group.shard, group.row_group, columns, patience)
    rows = group.rows
    if rows[-1] >= table.num_rows:
        place = f"{group.root}/{group.shard}: row group {group.row_group}"
        raise UserError(f"{place} has {table.num_rows} rows, {rows[-1] + 1} expected")
    table = table if len(rows) == table.num_rows else table.take(list(rows))
    return table if group.links is None else fetch(table, group.links, patience)


def cut_items(units: Iterator[Unit]) -> Iterator[list[Unit]]:
    """Groups units into items that are large enough for a task."""
    item: list[Unit] = []
    size = rows = 0
    for unit in units:
        item.append(unit)
        size += unit.group.size
        rows += len(unit.group.rows)
        if size >= ITEM_BYTES or rows >= ITEM_ROWS:
            yield item
            item, size, rows = [], 0, 0
    if item:
        yield item


def cut_segments(units: Iterator[Unit]) -> Iterator[list[list[Unit]]]:
    """Groups items into segments of 1, 2 and then `SEGMENT_ITEMS` of them."""
    items, length = cut_items(units), 1
    while segment := list(islice(items, length)):
        yield segment
        length = min(2 * length, SEGMENT_ITEMS)


def _execute(
    segment: list[list[Unit]], labels: str | None, patience: Patience
) -> tuple[list[list[Unit]], list[pa.Table]]:
    """One bounded execution."""
    blocks: Any = _data_of(segment, labels, patience).iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )
    return segment, list(blocks)


def _data_of(segment: list[list[Unit]], labels: str | None, patience: Patience) -> Any:
    """A dataset of Ray Data with a task and a block per item."""
    import ray.data

    quiet_data()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    items = [{"item": pack_item([unit.group for unit in item], labels, patience)} for item in segment]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read_item, batch_size=None, num_cpus=READ_CPUS
    )


def pack_item(groups: Sequence[Group], labels: str | None, patience: Patience) -> bytes:
    """The pickled arguments of `read_item`."""
    return pickle.dumps((groups, labels, patience))


def read_item(batch: Any) -> pa.Table:
    """Runs in a Ray task: the rows of the groups of one item in their order, or the reason why they cannot be read.

    The reason is returned as a row, because Ray Data would turn an exception into one of another type.
    """
    (packed,) = batch["item"]
    groups, labels, patience = pickle.loads(packed)
    at_once = FETCHES if all(group.places for group in groups) else 1  # links are read several at a time anyway
    try:
        with ThreadPoolExecutor(at_once) as pool:
            table = pa.concat_tables(pool.map(partial(read_rows, labels=labels, patience=patience), groups))
    except UserError as error:
        return pa.table({_PROBLEM: [str(error)]})
    return table.append_column(_RETRIES, pa.array(np.full(table.num_rows, patience.retries, np.int32)))


def split_block(item: list[Unit], block: pa.Table, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
    """Cuts a block back into its units, checks that it holds what the plan asked for, counts what the task counted."""
    if block.column_names == [_PROBLEM]:
        raise UserError(block[_PROBLEM][0].as_py())
    patience.add(block[_RETRIES][0].as_py())
    block = block.drop_columns(_RETRIES)
    start = 0
    for unit in item:
        table = block.slice(start, len(unit.group.rows))
        start += len(unit.group.rows)
        if unit.group.ids and tuple(table["id"].to_pylist()) != unit.group.ids:
            raise RuntimeError(f"{unit.group.shard}, row group {unit.group.row_group}: other rows than the index says")
        yield unit, table
    if start != block.num_rows:
        raise RuntimeError(f"a block of {block.num_rows} rows where {start} were planned")


# ---- small labeled sets -----------------------------------------------------------------------------------------


def is_held(dataset: Dataset, ids: Sequence[str]) -> bool:
    """Whether these labeled images are held: they are few bytes, or the index does not say where each one lies."""
    return not dataset.located or select_groups(dataset, ids, LABELED).size <= HELD_BYTES


def share(dataset: Dataset, ids: Sequence[str], patience: Patience) -> list[Any]:
    """Reads labeled images through Ray Data into the object store, if they are to be held.

    Returns:
        References to the blocks, for `held_reader` on any worker; none if the images stream.
    """
    if not is_held(dataset, ids):
        return []
    items = list(cut_items(_visits(dataset, ids)))
    return _data_of(items, None, patience).materialize().to_arrow_refs()


def held_reader(
    dataset: Dataset, ids: Sequence[str], blocks: Sequence[Any], reader: Reader, patience: Patience
) -> Reader:
    """A reader of single images that are held in memory.

    Args:
        dataset: where they are.
        ids: of all that it may be asked for.
        blocks: what `share` returned. Ray brings it to this node once, for all workers. Empty: `reader` reads them now.
        reader: reads them if they are not shared, or lost.
        patience: with the storage.

    Raises:
        UserError: as `read_rows`.
    """
    units = list(_visits(dataset, ids))
    pairs = _shared(units, blocks) if blocks else None
    held = pa.concat_tables(table for _, table in pairs or reader(units, None, patience))
    places = {name: place for place, name in enumerate(held["id"].to_pylist())}

    def read(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
        for unit in units:
            yield unit, held.slice(places[unit.group.ids[0]], 1)

    return read


def _visits(dataset: Dataset, ids: Sequence[str]) -> Iterator[Unit]:
    """Each row group with labeled images once."""
    for group in select_groups(dataset, ids, LABELED):
        yield Unit(0, 0, 0, group, tuple(range(len(group.rows))))


def _shared(units: list[Unit], blocks: Sequence[Any]) -> list[tuple[Unit, pa.Table]] | None:
    """What `share` has read, or nothing if it went with the nodes that held it."""
    import ray
    from ray.exceptions import RayError

    try:
        tables = ray.get(list(blocks))
    except RayError as error:
        log.warning("the shared labeled images are lost (%s): this worker reads them anew", type(error).__name__)
        return None
    items = zip(cut_items(iter(units)), tables, strict=True)
    return [pair for item, block in items for pair in split_block(item, block, Patience())]


# ---- samples of a step ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One encoded sample, and the epoch that its augmentation is keyed by."""

    epoch: int
    id: str
    image: memoryview | bytes
    mask: memoryview | bytes | None = None
    """The truth, on the labeled side alone."""
    label: memoryview | bytes | None = None
    """The pseudo-label mask, if the method uses one."""
    root: str = ""
    """The dataset or pool that it is from."""
    left_out: bool = False
    """Whether prepare was told to leave it out of its pool: it has no bytes, and that is no damage."""


class SampleStream:
    """The samples of this rank's lanes of one side, step by step, read ahead of need in the plan's order."""

    def __init__(
        self, plan: Plan, lanes: Sequence[int], start: int, reader: Reader, labels: str | None, patience: Patience
    ) -> None:
        """See `Reader` for the last three."""
        self._lanes = lanes
        self._units = reader(plan.units(lanes, start), labels, patience)
        self._queues: dict[int, deque[Sample]] = {lane: deque() for lane in lanes}

    def __iter__(self) -> Iterator[list[Sample]]:
        """Endless; each item holds one sample per lane."""
        while True:
            yield [self._next(lane) for lane in self._lanes]

    def _next(self, lane: int) -> Sample:
        queue = self._queues[lane]
        while not queue:  # units come in order of need: at most the other lanes' next ones are queued on the way
            unit, table = next(self._units)
            ids = unit.group.ids or table["id"].to_pylist()
            columns = {name: table[name].combine_chunks() for name in table.column_names if name != "id"}
            for row in unit.order:
                # the bytes where they lie: no copy out of the object store
                files = {name: memoryview(column[row].as_buffer()) for name, column in columns.items()}
                left_out = unit.group.copied and not len(files["image"])
                sample = Sample(unit.epoch, ids[row], **files, root=unit.group.root, left_out=left_out)
                self._queues[unit.lane].append(sample)
        return queue.popleft()
