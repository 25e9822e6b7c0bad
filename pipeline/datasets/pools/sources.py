"""What a pool can be made of: plain images, tar files of images, Parquet files with an image column.

A key is one thing that is sorted into the pool: an image, or a row group of a Parquet file.
"""

import io
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.files import IMAGE_SUFFIXES
from pipeline.datasets.pools.pool import BYTES_SCHEMA
from pipeline.datasets.prepared.dataset import read_group
from pipeline.errors import UserError

TAR_BUFFER = 64 << 10
"""Bytes per request while the headers of a tar file are read."""
Key = tuple[str, str, int, int, int]
"""Id, file below the root, offset (the number of the row group in Parquet), bytes, images."""


@dataclass(frozen=True)
class PoolSource:
    """One kind of files."""

    suffixes: tuple[str, ...]
    """Names of its files end so, in either case."""
    batch: int
    """Files that one task looks into."""
    keys: Callable[[str, str, int], Iterator[Key]]
    """The keys of one file: root, path below it, size in bytes."""


def _image(root: str, file: str, size: int) -> Iterator[Key]:
    yield file, file, 0, size, 1


def _tar(root: str, file: str, size: int) -> Iterator[Key]:
    """The images of a tar file; reads its headers and passes over the images."""
    uri = storage.join(root, file)
    filesystem, path = storage.resolve(uri)
    with storage.translated(uri), filesystem.open_input_file(path) as handle:
        try:
            with tarfile.open(fileobj=io.BufferedReader(handle, TAR_BUFFER), mode="r:") as archive:  # type: ignore[arg-type]
                for member in archive:
                    if member.isreg() and member.name.lower().endswith(IMAGE_SUFFIXES):
                        yield f"{file}/{member.name}", file, member.offset_data, member.size, 1
        except tarfile.TarError as error:
            raise UserError(f"{uri}: not a whole uncompressed tar file ({error})") from error


def _parquet(root: str, file: str, size: int) -> Iterator[Key]:
    """The row groups of a Parquet file; reads its footer."""
    uri = storage.join(root, file)
    filesystem, path = storage.resolve(uri)
    with storage.translated(uri), filesystem.open_input_file(path) as handle:
        try:
            metadata = pq.read_metadata(handle)
            _image_column(uri, metadata.schema.to_arrow_schema())
        except pa.ArrowInvalid as error:
            raise UserError(f"{uri}: not a readable Parquet file ({' '.join(str(error).split())})") from error
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.num_rows:
            yield f"{file}#{number}", file, number, group.total_byte_size, group.num_rows


def read_images(root: str, file: str, row_group: int) -> pa.Table:
    """The images of one row group of a team's Parquet file, as `BYTES_SCHEMA`; a null becomes no bytes.

    Raises:
        UserError: missing, damaged, or without a column of images.
    """
    uri = storage.join(root, file)
    filesystem, path = storage.resolve(uri)
    with storage.translated(uri), filesystem.open_input_file(path) as handle:
        column = _image_column(uri, pq.read_schema(handle))
    images = read_group(root, file, row_group, [column])[column].combine_chunks()
    if pa.types.is_struct(images.type):
        images = images.field("bytes")
    ids = [f"{file}#{row_group}.{row}" for row in range(len(images))]
    return pa.table([pa.array(ids), images.cast(pa.binary()).fill_null(b"")], schema=BYTES_SCHEMA)


def _image_column(uri: str, schema: pa.Schema) -> str:
    """The column called image, or else the only one of bytes (or of structs that hold `bytes`)."""

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [field.name for field in schema if holds_bytes(field.type)]
    if "image" in found or len(found) == 1:
        return "image" if "image" in found else found[0]
    raise UserError(f"{uri}: no column `image` of bytes, or of structs with `bytes`; its columns are {schema.names}")


POOL_SOURCES = {
    "images": PoolSource(IMAGE_SUFFIXES, 50_000, _image),
    "tar": PoolSource((".tar",), 4, _tar),
    "parquet": PoolSource((".parquet",), 64, _parquet),
}


def is_addressable(file: str) -> bool:
    """Whether a file below a prefix can be named by a URI; object stores allow keys that cannot."""
    return posixpath.normpath(file) == file and not set(file) & set("?\\\0") and not file.startswith(("/", ".."))
