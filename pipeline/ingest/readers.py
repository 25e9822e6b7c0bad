"""Reading the units of a plan: inline, or on the cluster through Ray Data in bounded segments.

One interface: `read(units) -> (unit, table)` in the order of the units, the table holding `id` and `image` of the
unit's group. The unlabeled side asks for no other column, so no method can see an unlabeled mask.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.datasets.format import read_group
from pipeline.datasets.pools import LINKS_SCHEMA, fetch
from pipeline.errors import UserError
from pipeline.ingest.plan import Group, Unit

Reader = Callable[[Iterable[Unit]], Iterator[tuple[Unit, pa.Table]]]

ITEM_BYTES = 24 << 20
"""Encoded bytes that one Ray task reads: an item costs about 60 ms of CPU whatever its size."""
ITEM_ROWS = 512
READ_CPUS = 0.25
"""CPUs that a read task reserves: it mostly waits."""
SEGMENT_ITEMS = 4
"""Items per Ray Data execution; two segments are held in the object store at a time."""


def read_inline(units: Iterable[Unit]) -> Iterator[tuple[Unit, pa.Table]]:
    """Reads in this thread, without Ray: the reference order, for tests and single processes."""
    for unit in units:
        yield unit, read_rows(*_place(unit.group))


def read_ray(units: Iterable[Unit]) -> Iterator[tuple[Unit, pa.Table]]:
    """Reads through a chain of small Ray Data executions, the next one started when the one before is consumed.

    A long execution must not stay open behind a slow consumer: once its budget is full, Ray Data's scheduling thread
    spins. A segment is bounded, so its execution ends by itself and its blocks wait in the object store.
    """
    segments = _segments(iter(units))
    with ThreadPoolExecutor(1, thread_name_prefix="segment") as pool:
        pending = pool.submit(_execute, next(segments))
        while True:
            segment, blocks = pending.result()
            pending = pool.submit(_execute, next(segments))
            for items, block in zip(segment, blocks, strict=True):
                yield from _split(items, block)


def read_rows(root: str, shard: str, row_group: int, rows: Iterable[int], links: str | None = None) -> pa.Table:
    """`id` and `image` of some rows of a row group.

    Args:
        root: the dataset or pool.
        shard: path below `root`.
        row_group: which group of the shard.
        rows: positions inside the group, ascending.
        links: where the images lie, if the group holds links to them.

    Raises:
        UserError: missing or damaged, fewer rows than planned, or the storage refuses.
    """
    table = read_group(root, shard, row_group, ["id", "image"] if links is None else LINKS_SCHEMA.names)
    wanted = list(rows)
    if wanted[-1] >= table.num_rows:
        raise UserError(f"{root}/{shard}: row group {row_group} has {table.num_rows} rows, {wanted[-1] + 1} expected")
    table = table if len(wanted) == table.num_rows else table.take(wanted)
    return table if links is None else fetch(table, links)


def _place(group: Group) -> tuple[str, str, int, list[int], str | None]:
    """What `read_rows` takes."""
    return group.root, group.shard, group.row_group, list(group.rows), group.links


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


def _execute(segment: list[list[Unit]]) -> tuple[list[list[Unit]], list[pa.Table]]:
    """One bounded Ray Data execution: a task and a block per item."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.print_on_execution_start = False
    groups = [{"groups": [_place(unit.group) for unit in item]} for item in segment]
    dataset = ray.data.from_items(groups, override_num_blocks=len(groups)).map_batches(
        _read_item, batch_size=None, num_cpus=READ_CPUS
    )
    blocks: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    return segment, list(blocks)


def _read_item(batch: Any) -> pa.Table:
    """Runs in a Ray task: the groups of one item, back to back."""
    return pa.concat_tables(read_rows(*group) for groups in batch["groups"] for group in groups)


def _split(item: list[Unit], block: pa.Table) -> Iterator[tuple[Unit, pa.Table]]:
    """Cuts a block back into its units and checks that it holds what the plan asked for."""
    start = 0
    for unit in item:
        table = block.slice(start, len(unit.group.rows))
        start += len(unit.group.rows)
        if unit.group.ids is not None and tuple(table["id"].to_pylist()) != unit.group.ids:
            raise RuntimeError(f"{unit.group.shard}, row group {unit.group.row_group}: other rows than the index says")
        yield unit, table
    if start != block.num_rows:
        raise RuntimeError(f"a block of {block.num_rows} rows where {start} were planned")
