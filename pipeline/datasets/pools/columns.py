"""Files of columns that hold what is known of images, not the images: whole or not there, brief trouble waited out."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.patience import retried


def write_batches(uri: str, tables: Sequence[pa.Table]) -> None:
    """An Arrow file with a batch per table (one or more, of one schema), each readable by itself."""
    sink, schema = pa.BufferOutputStream(), tables[0].schema
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for table in tables:
            writer.write_batch(pa.record_batch([c.combine_chunks() for c in table.columns], schema=schema))
    retried(partial(storage.write_bytes, uri, sink.getvalue().to_pybytes()))


def read_batches(uri: str, batch: int | None = None) -> pa.Table:
    """All batches of such a file as one table, or one of them."""

    def read() -> pa.Table:
        filesystem, path = storage.resolve(uri)
        with storage.translated(uri), filesystem.open_input_file(path) as handle:
            file = pa.ipc.open_file(handle)
            numbers = range(file.num_record_batches) if batch is None else [batch]
            return pa.Table.from_batches([file.get_batch(number) for number in numbers])

    return retried(read)


def write_parquet(uri: str, table: pa.Table, group_rows: int, **options: Any) -> None:
    """A Parquet file in row groups of `group_rows`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=group_rows, **options)
    retried(partial(storage.write_bytes, uri, sink.getvalue().to_pybytes()))


def read_parquet(uri: str, columns: Sequence[str], groups: Sequence[int] | None = None) -> pa.Table:
    """Some columns of a Parquet file, of all or some of its row groups."""

    def read() -> pa.Table:
        filesystem, path = storage.resolve(uri)
        with storage.translated(uri), filesystem.open_input_file(path) as handle:
            file = pq.ParquetFile(handle)
            every = range(file.num_row_groups) if groups is None else groups
            return file.read_row_groups(list(every), columns=list(columns), use_threads=False)

    return retried(read)
