"""Reading the units of a plan: inline, or on the cluster through Ray Data in bounded segments.

One interface: `read(units) -> (unit, table)` in the order of the units, the table holding `id` and `image` of the
unit's group, and `retries`, how often the storage had to be asked again for them (int32, on the first row). The
unlabeled side asks a dataset for no other column, so no method can see an unlabeled mask; what a network saw in the
images, its pseudo-labels, comes from files of their own.
"""

import pickle
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.datasets.format import read_group
from pipeline.datasets.pseudo import read_labels
from pipeline.ingest.plan import Group, Unit


class Reader(Protocol):
    """How the unlabeled stream is read."""

    def __call__(self, units: Iterable[Unit], labels: str | None = None) -> Iterator[tuple[Unit, pa.Table]]:
        """Reads `id` and `image`, and `label` if a place of pseudo-labels is named."""
        ...


ITEM_BYTES = 24 << 20
"""Encoded bytes that one Ray task reads: an item costs about 60 ms of CPU whatever its size."""
ITEM_ROWS = 512
READ_CPUS = 0.25
"""CPUs that a read task reserves: it mostly waits."""
SEGMENT_ITEMS = 4
"""Items per Ray Data execution; two segments are held in the object store at a time."""


def read_inline(units: Iterable[Unit], labels: str | None = None) -> Iterator[tuple[Unit, pa.Table]]:
    """Reads in this thread, without Ray: the reference order, for tests and single processes."""
    for unit in units:
        yield unit, read_rows(unit.group, labels)


def read_ray(units: Iterable[Unit], labels: str | None = None) -> Iterator[tuple[Unit, pa.Table]]:
    """Reads through a chain of small Ray Data executions, the next one started when the one before is consumed.

    A long execution must not stay open behind a slow consumer: once its budget is full, Ray Data's scheduling thread
    spins. A segment is bounded, so its execution ends by itself and its blocks wait in the object store.
    """
    segments = _segments(iter(units))
    with ThreadPoolExecutor(1, thread_name_prefix="segment") as pool:
        pending = pool.submit(_execute, next(segments), labels)
        while True:
            segment, blocks = pending.result()
            pending = pool.submit(_execute, next(segments), labels)
            for items, block in zip(segment, blocks, strict=True):
                yield from _split(items, block)


def read_rows(group: Group, labels: str | None = None) -> pa.Table:
    """`id`, `image` and `retries` of the rows of a group, and `label` if a place of pseudo-labels is named."""
    before = storage.retries()
    table = read_group(group.root, group.shard, group.row_group, ["id", "image"])
    if len(group.rows) < table.num_rows:
        table = table.take(list(group.rows))
    if labels is not None:
        table = table.append_column("label", read_labels(labels, group.shard, group.row_group, group.ids or ()))
    counts = np.zeros(len(group.rows), np.int32)
    counts[:1] = storage.retries() - before
    return table.append_column("retries", pa.array(counts))


def _items(units: Iterator[Unit]) -> Iterator[list[Unit]]:
    """Units in runs that are worth a task."""
    item: list[Unit] = []
    size = rows = 0
    for unit in units:
        item.append(unit)
        size += unit.group.size
        rows += len(unit.group.rows)
        if size >= ITEM_BYTES or rows >= ITEM_ROWS:
            yield item
            item, size, rows = [], 0, 0


def _segments(units: Iterator[Unit]) -> Iterator[list[list[Unit]]]:
    items = _items(units)
    while segment := list(islice(items, SEGMENT_ITEMS)):
        yield segment


def _execute(segment: list[list[Unit]], labels: str | None) -> tuple[list[list[Unit]], list[pa.Table]]:
    """One bounded Ray Data execution: a task and a block per item."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.print_on_execution_start = False
    items = [{"item": pickle.dumps(([unit.group for unit in item], labels))} for item in segment]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _read_item, batch_size=None, num_cpus=READ_CPUS
    )
    blocks: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    return segment, list(blocks)


def _read_item(batch: Any) -> pa.Table:
    """Runs in a Ray task: the groups of one item, back to back."""
    items = map(pickle.loads, batch["item"])
    return pa.concat_tables(read_rows(group, labels) for groups, labels in items for group in groups)


def _split(item: list[Unit], block: pa.Table) -> Iterator[tuple[Unit, pa.Table]]:
    """Cuts a block back into its units and checks that it holds what the plan asked for."""
    start = 0
    for unit in item:
        table = block.slice(start, len(unit.group.rows))
        start += len(unit.group.rows)
        if tuple(table["id"].to_pylist()) != unit.group.ids:
            raise RuntimeError(f"{unit.group.shard}, row group {unit.group.row_group}: other rows than the index says")
        yield unit, table
    if start != block.num_rows:
        raise RuntimeError(f"a block of {block.num_rows} rows where {start} were planned")
