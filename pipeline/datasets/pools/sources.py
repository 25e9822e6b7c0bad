"""What a pool can be made of: plain images, tar files of images, Parquet files with an image column.

A key is one thing that is sorted into the pool: an image, or a row group of a Parquet file. Files come from outside:
whatever is wrong with one is told in one line that names it.
"""

import contextlib
import io
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.files import IMAGE_SUFFIXES, escaped, has_suffix, is_junk
from pipeline.datasets.pools.pool import BYTES_SCHEMA
from pipeline.errors import UserError
from pipeline.patience import retried

TAR_BUFFER = 64 << 10
"""Bytes per request while the headers of a tar file are read."""
Key = tuple[str, str, int, int, int]
"""Id, file below the root, offset (the number of the row group in Parquet), bytes, images; no images: it is told, and
left out."""


@dataclass(frozen=True)
class PoolSource:
    """One kind of files."""

    suffixes: tuple[str, ...]
    """Names of its files end so, in either case."""
    batch: int
    """Files that one task looks into."""
    keys: Callable[..., Iterator[Key]]
    """The keys of one file: root, path below it, size in bytes, name of the image column or nothing."""


def _image(root: str, file: str, size: int, column: str = "") -> Iterator[Key]:
    yield file, file, 0, size, 1


# ---- tar ----------------------------------------------------------------------------------------------------------


def _tar(root: str, file: str, size: int, column: str = "") -> Iterator[Key]:
    """The images of a tar file; reads its headers and passes over the images.

    Files of one sample share their name up to the first dot (WebDataset's rule): 0000.seg.png beside 0000.jpg is
    something about that image, and none itself.
    """
    uri = storage.join(root, file)
    filesystem, path = storage.resolve(uri)
    with storage.translated(uri), filesystem.open_input_file(path) as handle:
        # Not the size of the listing: a file that was cut may have been mended since.
        members = _members(uri, io.BufferedReader(handle, TAR_BUFFER), handle.size())  # type: ignore[arg-type]
    plain = {stem for stem in (posixpath.splitext(name)[0] for name, _, _ in members) if stem == _sample(stem)}
    for name, offset, length in members:
        about = _sample(name) in plain and _sample(name) != posixpath.splitext(name)[0]
        yield f"{file}/{escaped(name)}", file, offset, length, int(not about)


def _members(uri: str, handle: io.BufferedReader, size: int) -> list[tuple[str, int, int]]:
    """Names, first bytes and sizes of the members of a tar file of `size` bytes that are named as images."""
    found = []
    with _damage_named(uri, "not a whole uncompressed tar file"), tarfile.open(fileobj=handle, mode="r:") as archive:
        for member in archive:
            if member.size < 0:  # tarfile would go back, for ever
                raise tarfile.ReadError("a member of negative size")
            name = "/".join(part for part in member.name.split("/") if part not in (".", ".."))
            if member.isreg() and has_suffix(name, IMAGE_SUFFIXES) and not is_junk(name):
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                found.append((member.name, member.offset_data, member.size))
    return found


def _sample(name: str) -> str:
    """The name of a member up to the first dot of its last part."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".", 1)[0])


# ---- Parquet ------------------------------------------------------------------------------------------------------


def _parquet(root: str, file: str, size: int, column: str = "") -> Iterator[Key]:
    """The row groups of a Parquet file; reads its footer."""
    uri = storage.join(root, file)
    filesystem, path = storage.resolve(uri)
    what = "not a readable Parquet file"
    with storage.translated(uri), filesystem.open_input_file(path) as handle, _damage_named(uri, what):
        metadata = pq.read_metadata(handle)
        _image_column(uri, metadata.schema.to_arrow_schema(), column)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        if any(rows < 0 for rows, _ in sizes) or sum(rows for rows, _ in sizes) != metadata.num_rows:
            raise pa.ArrowInvalid("its numbers of rows do not agree")
    for number, (rows, length) in enumerate(sizes):
        if rows:
            yield f"{file}#{number}", file, number, length, rows


def read_images(root: str, file: str, row_group: int, column: str = "") -> pa.Table:
    """The images of one row group of a team's Parquet file, as `BYTES_SCHEMA`; a null becomes no bytes.

    Args:
        root: what the file is below.
        file: its path there.
        row_group: which group.
        column: of the images; empty: the one called image, or else the only one of bytes.

    Raises:
        UserError: missing, damaged, without a column of images, or no image of the whole file has bytes.
    """
    uri = storage.join(root, file)
    return retried(lambda: _read_images(uri, file, row_group, column))


def _read_images(uri: str, file: str, row_group: int, column: str) -> pa.Table:
    filesystem, path = storage.resolve(uri)
    what = f"row group {row_group} is damaged"
    with storage.translated(uri), filesystem.open_input_file(path) as handle, _damage_named(uri, what):
        reader = pq.ParquetFile(handle, page_checksum_verification=True, pre_buffer=True)
        name = _image_column(uri, reader.schema_arrow, column)
        images = _group_bytes(reader, row_group, name)
        others = (number for number in range(reader.num_row_groups) if number != row_group)
        if not _any_bytes(images) and not any(_any_bytes(_group_bytes(reader, each, name)) for each in others):
            raise UserError(
                f"{uri}: no image in column `{name}` has bytes: the file holds paths or nothing; write the encoded "
                "images into it, or make a pool of the files themselves (--source images)"
            )
        ids = [f"{file}#{row_group}.{row}" for row in range(len(images))]
        return pa.table([pa.array(ids, pa.string()), images], schema=BYTES_SCHEMA)


def _group_bytes(reader: pq.ParquetFile, row_group: int, column: str) -> pa.ChunkedArray:
    """A column of images of a row group as binary, without nulls."""
    table = reader.read_row_group(row_group, columns=[column], use_threads=False)
    if table.column_names != [column] or len(table) != reader.metadata.row_group(row_group).num_rows:
        raise pa.ArrowInvalid(f"it has the columns {table.column_names} in {len(table)} rows")
    return pa.chunked_array([_plain_bytes(chunk) for chunk in table[column].chunks], pa.binary())


def _plain_bytes(array: pa.Array) -> pa.Array:
    if pa.types.is_struct(array.type):
        return _plain_bytes(array.flatten()[array.type.get_field_index("bytes")])  # null where the struct is
    if pa.types.is_dictionary(array.type):
        return _plain_bytes(array.dictionary_decode())
    return array.cast(pa.binary()).fill_null(b"")


def _any_bytes(images: pa.ChunkedArray) -> bool:
    return any(image.as_py() for image in images)


def _image_column(uri: str, schema: pa.Schema, column: str) -> str:
    """The named column, or the one called image, or else the only one of bytes (or of structs that hold `bytes`)."""
    found = [field.name for field in schema if _holds_bytes(field.type)]
    wanted = column or ("image" if "image" in found or len(found) != 1 else found[0])
    if wanted in found:
        return wanted
    if column or not found:
        raise UserError(
            f"{uri}: no column `{wanted}` of bytes, or of structs with `bytes`; its columns are {schema.names}"
        )
    raise UserError(f"{uri}: several columns of bytes, {found}; name the one of the images: --column NAME")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


@contextlib.contextmanager
def _damage_named(uri: str, what: str) -> Iterator[None]:
    """Readers raise almost anything on damaged files: all of it becomes one line. Trouble of the storage passes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # A reader's own complaints carry neither an errno (the operating system's do) nor S3's mark.
        if isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error)):
            raise
        if isinstance(error, ConnectionError | TimeoutError):
            raise
        text = " ".join(escaped(str(error)).split()) or type(error).__name__
        raise UserError(f"{uri}: {what} ({text})") from error


POOL_SOURCES = {
    "images": PoolSource(IMAGE_SUFFIXES, 50_000, _image),
    "tar": PoolSource((".tar",), 4, _tar),
    "parquet": PoolSource((".parquet",), 64, _parquet),
}
