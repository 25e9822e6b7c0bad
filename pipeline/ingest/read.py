"""Reading the samples of a step: the labeled set into memory, the unlabeled units of a plan as a stream.

Units are read inline, or on the cluster through Ray Data in bounded segments. One interface: `read(units) -> (unit,
table)` in the order of the units, the table holding `id` and `image` of the unit's group. The unlabeled side asks a
dataset for no other column, so no method can see an unlabeled mask; what a network saw in the images, its
pseudo-labels, comes from files of their own.
"""

import pickle
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline.datasets.pools.pool import LINKS_SCHEMA, fetch
from pipeline.datasets.prepared.dataset import Dataset, read_group
from pipeline.datasets.prepared.pseudo import read_labels
from pipeline.errors import UserError
from pipeline.ingest.order import Group, Permutation, Plan, Unit, select_groups
from pipeline.storage import Patience

# ---- units of a plan --------------------------------------------------------------------------------------------


class Reader(Protocol):
    """How the unlabeled stream is read."""

    def __call__(
        self, units: Iterable[Unit], labels: str | None, patience: Patience
    ) -> Iterator[tuple[Unit, pa.Table]]:
        """Reads `id` and `image`, and `label` if pseudo-labels are named; counts trouble in `patience`."""
        ...


ITEM_BYTES = 24 << 20
"""Encoded bytes that one Ray task reads. A task costs about 60 ms of CPU whatever it reads."""
ITEM_ROWS = 512
READ_CPUS = 0.25
"""CPUs that a read task reserves: it mostly waits."""
SEGMENT_ITEMS = 4
"""Items per Ray Data execution. The object store holds two segments at a time. The first segments are smaller, so that
the first batch waits for one item and a short run reads less ahead."""
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
    segments = cut_segments(iter(units))
    with ThreadPoolExecutor(1, thread_name_prefix="segment") as pool:
        pending = pool.submit(_execute, next(segments), labels, patience)
        while True:
            segment, blocks = pending.result()
            pending = pool.submit(_execute, next(segments), labels, patience)
            for items, block in zip(segment, blocks, strict=True):
                yield from split_block(items, block, patience)


def read_rows(group: Group, labels: str | None, patience: Patience) -> pa.Table:
    """`id` and `image` of the rows of a group, and `label` if a place of pseudo-labels is named.

    Raises:
        UserError: missing or damaged, fewer rows than planned, an image without a label, or the storage refuses.
    """
    table = _read(group, patience)
    if labels is None:
        return table
    return table.append_column("label", read_labels(labels, group.shard, group.row_group, group.ids, patience))


def _read(group: Group, patience: Patience) -> pa.Table:
    columns = ["id", "image"] if group.links is None else LINKS_SCHEMA.names
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


def cut_segments(units: Iterator[Unit]) -> Iterator[list[list[Unit]]]:
    """Groups items into segments of 1, 2 and then `SEGMENT_ITEMS` of them."""
    items, length = cut_items(units), 1
    while segment := list(islice(items, length)):
        yield segment
        length = min(2 * length, SEGMENT_ITEMS)


def _execute(
    segment: list[list[Unit]], labels: str | None, patience: Patience
) -> tuple[list[list[Unit]], list[pa.Table]]:
    """One bounded Ray Data execution: a task and a block per item."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.print_on_execution_start = False
    items = [{"item": pack_item([unit.group for unit in item], labels, patience)} for item in segment]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read_item, batch_size=None, num_cpus=READ_CPUS
    )
    blocks: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    return segment, list(blocks)


def pack_item(groups: Sequence[Group], labels: str | None, patience: Patience) -> bytes:
    """The pickled arguments of `read_item`."""
    return pickle.dumps((groups, labels, patience))


def read_item(batch: Any) -> pa.Table:
    """Runs in a Ray task: the groups of one item, one after the other, or the reason why they cannot be read.

    The reason is returned as a row, because Ray Data would turn an exception into one of another type.
    """
    (packed,) = batch["item"]
    groups, labels, patience = pickle.loads(packed)
    try:
        table = pa.concat_tables(read_rows(group, labels, patience) for group in groups)
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


# ---- samples of a step ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One encoded sample, and the epoch that its augmentation is keyed by."""

    epoch: int
    id: str
    image: memoryview | bytes
    mask: memoryview | bytes | None
    """The truth, on the labeled side alone."""
    label: memoryview | bytes | None = None
    """The pseudo-label mask, if the method uses one."""
    root: str = ""
    """The dataset or pool that it is from."""
    left_out: bool = False
    """Whether prepare was told to leave it out of its pool: it has no bytes, and that is no damage."""


class LabeledSet:
    """The labeled samples: encoded bytes in memory, drawn by an endless seeded permutation.

    Every worker holds the whole set, because any worker may need any sample. So the sequence of global batches does not
    depend on the number of workers.
    """

    def __init__(self, dataset: Dataset, ids: Sequence[str], seed: int, patience: Patience) -> None:
        """Reads the row groups that hold `ids` and keeps only these rows."""
        self._seed, self._root = seed, dataset.root
        self._ids = sorted(ids)
        self._bytes: dict[str, tuple[bytes, bytes]] = {}
        with ThreadPoolExecutor(4) as pool:
            for rows in pool.map(partial(_labeled_rows, patience=patience), select_groups(dataset, ids)):
                self._bytes.update(rows)

    def samples(self, positions: Sequence[int], step: int, global_batch: int) -> list[Sample]:
        """The samples at `positions` of the global batch of `step`."""
        epochs, places = np.divmod(np.asarray(positions) + step * global_batch, len(self._ids))
        found = []
        for epoch, place in zip(epochs.tolist(), places, strict=True):
            order = Permutation(len(self._ids), self._seed, "labeled", epoch)
            name = self._ids[int(order(place[None])[0])]
            image, mask = self._bytes[name]
            found.append(Sample(epoch, name, memoryview(image), memoryview(mask), root=self._root))
        return found


def _labeled_rows(group: Group, patience: Patience) -> list[tuple[str, tuple[bytes, bytes]]]:
    table = read_group(group.root, group.shard, group.row_group, ["id", "image", "mask"], patience)
    table = table.take(list(group.rows))
    columns = (table[name].to_pylist() for name in ("id", "image", "mask"))
    return [(name, (image, mask)) for name, image, mask in zip(*columns, strict=True)]


class UnlabeledStream:
    """The samples of this rank's lanes, step by step, read ahead of need in the plan's order."""

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
            ids, images = unit.group.ids or table["id"].to_pylist(), table["image"].combine_chunks()
            labels = table["label"].combine_chunks() if "label" in table.column_names else None
            for row in unit.order:
                image, label = _view(images, row), None if labels is None else _view(labels, row)
                left_out = unit.group.copied and not len(image)
                sample = Sample(unit.epoch, ids[row], image, None, label, unit.group.root, left_out)
                self._queues[unit.lane].append(sample)
        return queue.popleft()


def _view(column: pa.Array, row: int) -> memoryview:
    """The bytes of one image, where they lie (no copy out of the object store)."""
    return memoryview(column[row].as_buffer())
