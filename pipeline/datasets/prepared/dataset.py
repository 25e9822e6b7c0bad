"""What a prepared dataset is, and how it is read.

A dataset is a folder on any storage:

    dataset.json                          what it is (`DatasetInfo`); written last: makes the rest a dataset
    index.parquet                         one row per sample (`INDEX_SCHEMA`), train before val
    shards/train-00000.parquet, ...       the encoded bytes (`SHARD_SCHEMA`), rows shuffled, small row groups
                                          (index-2.parquet and shards-2/... where it has replaced another one)
    splits/PROTOCOL/SPLIT/labeled.txt     which images count as labeled (see `pipeline.datasets.prepared.splits`)

Shards are neither compressed (JPEG and PNG already are) nor dictionary-encoded; their pages carry checksums. So each
file lies in its shard byte for byte, and the index says where: any choice of images is read without the others.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import UserError
from pipeline.patience import Patience, is_brief
from pipeline.records import read_record

SCHEMA_VERSION = 1
IGNORE_INDEX = 255
SUBSETS = ("train", "val")
INFO_FILE = "dataset.json"
INDEX_FILE = "index.parquet"
ATTEMPT_FILE = "prepare.json"
"""What prepare is about to make; there until it has finished."""
SHARD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # the original JPEG or PNG file
        pa.field("mask", pa.binary()),  # PNG, one channel of class ids; null where unlabeled
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
    ]
)
INDEX_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("subset", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),  # path below the root
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),  # inside the row group
        pa.field("image_bytes", pa.int64(), nullable=False),
        pa.field("mask_bytes", pa.int64(), nullable=False),  # 0: no mask
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        # where the bytes lie in the shard, and their CRC-32; 0 where there is no mask
        pa.field("image_at", pa.int64(), nullable=False),
        pa.field("image_crc", pa.int64(), nullable=False),
        pa.field("mask_at", pa.int64(), nullable=False),
        pa.field("mask_crc", pa.int64(), nullable=False),
        pa.field("classes", pa.list_(pa.uint8()), nullable=False),  # that its mask shows, ascending
    ]
)
OLDER_INDEX = pa.schema(list(INDEX_SCHEMA)[: INDEX_SCHEMA.get_field_index("image_at")])
"""The index of version 0.1.0, which does not say where images lie."""
_READ_SCHEMAS = (INDEX_SCHEMA, pa.schema(list(INDEX_SCHEMA)[:-1]), OLDER_INDEX)
"""Newest first."""
WRITE_OPTIONS: dict[str, Any] = {
    "compression": "NONE",
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
}
"""How files with image bytes are written."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The content of dataset.json."""

    name: str
    """For people; means nothing to the program."""
    classes: tuple[str, ...]
    """Names by class id."""
    palette: tuple[tuple[int, int, int], ...]
    """RGB colour by class id."""
    counts: dict[str, int]
    """Images per subset: train (with and without mask) and val."""
    evaluation: str
    """How val is scored unless the run says otherwise: whole or sliding."""
    protocol: str
    """Split lists that are used unless the run names others; empty if no image has a mask."""
    index_hash: str
    """SHA-256 of index.parquet."""
    shards: dict[str, int]
    """Size in bytes by path below the root."""
    index: str = INDEX_FILE
    """Path of the index below the root."""
    lists: tuple[str, ...] = ()
    """Paths of the split lists that prepare wrote; others below splits/ are the user's."""
    masked: dict[str, int] = field(default_factory=dict)
    """Images with a mask per subset."""
    pixels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Pixels of all masks per subset: of each class, and last of those that are ignored."""
    skipped: int = 0
    """Bad samples that prepare left out because it was told to."""
    bands: tuple[int, ...] = ()
    """Which bands of the source's files images are made of, from 0; empty: images are RGB."""
    ranges: tuple[tuple[float, float], ...] = ()
    """Of each band: the source's values that became 0 and 255."""
    mean: tuple[float, ...] = ()
    """Of each band over the train images, 0..255; empty: images are RGB, networks take ImageNet's colours."""
    std: tuple[float, ...] = ()
    """The standard deviation, in the same way; at least 1."""
    ignore_index: int = IGNORE_INDEX
    """Mask value of pixels that are neither trained on nor scored."""
    schema_version: int = SCHEMA_VERSION
    """Version of this format."""

    def __post_init__(self) -> None:
        if any(len(found) != len(self.classes) + 1 for found in self.pixels.values()):
            raise ValueError("pixels of another number of classes")

    @property
    def background(self) -> int | None:
        """The class of what is no object: the one named background, or _background_ as labelme has it.

        None for data in which every class is something.
        """
        names = [name.strip("_").lower() for name in self.classes]
        return names.index("background") if "background" in names else None

    def unseen(self, *subsets: str) -> tuple[str, ...]:
        """The classes that no mask of `subsets` shows; none if the masks were not counted."""
        counts = [self.pixels[subset][:-1] for subset in subsets if any(self.pixels.get(subset, ()))]
        return tuple(name for name, *found in zip(self.classes, *counts, strict=True) if counts and not any(found))

    def ignored(self, *subsets: str) -> float:
        """Share of the pixels of the masks of `subsets` that are ignored."""
        counts = [self.pixels[subset] for subset in subsets if subset in self.pixels]
        return sum(found[-1] for found in counts) / max(1, sum(map(sum, counts)))

    def to_json(self) -> str:
        """As text; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "DatasetInfo":
        """Reads what `to_json` wrote; keys it does not know are left out.

        Raises:
            ValueError: not such a text.
        """
        return read_record(cls, text)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A cheap, picklable handle: where the dataset is, what it is and what it holds; no image bytes."""

    root: str
    """URI without a trailing slash, valid in every working directory."""
    info: DatasetInfo
    """The content of dataset.json."""
    index: pa.Table
    """One row per sample, `INDEX_SCHEMA`; that of an older version lacks its last columns."""

    @property
    def located(self) -> bool:
        """Whether the index says where images lie in their shards."""
        return "image_at" in self.index.column_names

    @property
    def classified(self) -> bool:
        """Whether the index says which classes masks show."""
        return "classes" in self.index.column_names

    def subset(self, name: str) -> pa.Table:
        """The rows of the index that belong to the subset `name` (train or val), in stored order."""
        return self.index.filter(pc.field("subset") == name)


def open_dataset(root: str) -> Dataset:
    """Opens the dataset at `root` (a path or URI); reads dataset.json and the index, no shard.

    Raises:
        UserError: nothing is there, prepare did not finish, the index was changed, or the format is of
            another version.
    """
    root = storage.absolute(root)
    info = _read_info(root)
    data = storage.read_bytes(storage.join(root, info.index))
    if hashlib.sha256(data).hexdigest() != info.index_hash:
        raise UserError(f"{root}/{info.index}: not the file that {INFO_FILE} describes; prepare the dataset again")
    try:
        index = pq.read_table(pa.BufferReader(data), use_threads=False).combine_chunks()  # one row is found at once
    except pa.ArrowException as error:
        raise UserError(f"{root}/{info.index}: not readable ({error}); prepare the dataset again") from error
    if not any(map(index.schema.equals, _READ_SCHEMAS)):
        raise UserError(f"{root}/{info.index}: has other columns than this version knows; prepare the dataset again")
    return Dataset(root, info, index)


def _read_info(root: str) -> DatasetInfo:
    uri = storage.join(root, INFO_FILE)
    if not storage.exists(uri):
        if storage.exists(storage.join(root, ATTEMPT_FILE)):
            raise UserError(f"{root}: prepare did not finish; run it again")
        raise UserError(f"{root}: no dataset there ({INFO_FILE} is missing); make one with `u2pl prepare`")
    try:
        info = DatasetInfo.from_json(storage.read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri}: not readable ({error}); prepare the dataset again") from error
    if info.schema_version != SCHEMA_VERSION:
        raise UserError(f"{uri}: format version {info.schema_version}, this program reads {SCHEMA_VERSION}")
    return info


def read_group(root: str, shard: str, row_group: int, columns: list[str], patience: Patience | None = None) -> pa.Table:
    """Reads one row group; brief trouble of the storage is waited for.

    Each call has a Parquet reader of its own: one that is shared between threads hangs. Of the last files on S3 size
    and footer are known, so that a row group of them is one request.

    Args:
        root: the dataset.
        shard: path of the shard below `root`, as in the index.
        row_group: which group of the shard.
        columns: names out of `SHARD_SCHEMA`.
        patience: for how long; None: for as long as where nothing is said.

    Returns:
        The rows in stored order, columns as asked.

    Raises:
        UserError: the shard is missing or damaged (page checksums are verified), or the storage refuses.
    """
    uri = storage.join(root, shard)
    return (patience or Patience()).retried(lambda: _read_group(uri, row_group, columns))


def _read_group(uri: str, row_group: int, columns: list[str]) -> pa.Table:
    filesystem, path = storage.resolve(uri)
    with storage.translated(uri):
        if uri.startswith("s3://"):
            try:
                return _group_of(storage.opened(uri), row_group, columns, _footer(uri))
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and is_brief(error):
                    raise  # otherwise it may be another file than it was when it was opened
        with filesystem.open_input_file(path) as handle:
            try:
                return _group_of(handle, row_group, columns)
            except (pa.ArrowException, OSError) as error:
                # Parquet's own complaints carry neither an errno (the operating system's do) nor S3's mark.
                if isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error)):
                    raise
                message = " ".join(str(error).split())
                raise UserError(
                    f"{uri}: row group {row_group} is damaged ({message}); prepare the dataset again"
                ) from error


def _group_of(handle: Any, row_group: int, columns: list[str], footer: pq.FileMetaData | None = None) -> pa.Table:
    file = pq.ParquetFile(handle, metadata=footer, page_checksum_verification=True, pre_buffer=True)
    if not 0 <= row_group < file.num_row_groups:
        raise pa.ArrowInvalid(f"it has {file.num_row_groups} row groups")
    table = file.read_row_group(row_group, columns=columns, use_threads=False)
    if set(table.column_names) != set(columns):
        raise pa.ArrowInvalid(f"it has the columns {file.schema_arrow.names}")
    return table.select(columns)


@lru_cache(maxsize=storage.KNOWN_OBJECTS)
def _footer(uri: str) -> pq.FileMetaData:
    """Where the row groups of a file on S3 lie."""
    return pq.read_metadata(storage.opened(uri))


class Place(NamedTuple):
    """Where a file lies in its shard."""

    start: int
    """First byte."""
    size: int
    """Bytes."""
    crc: int
    """CRC-32 of these."""


def read_places(
    uri: str, places: Sequence[Place], names: Sequence[str], spare: float, patience: Patience
) -> list[memoryview]:
    """Reads files out of a shard, in few requests; brief trouble of the storage is waited for.

    Args:
        uri: of the shard.
        places: of the files, at least one, in any order.
        names: of the files, for errors.
        spare: bytes between them that may be read, too, as a share of theirs: the narrowest gaps are read over.
        patience: for how long.

    Returns:
        The bytes of each, in the order of `places`.

    Raises:
        UserError: the shard is missing or damaged, or the storage refuses.
    """
    found: list[memoryview] = [memoryview(b"")] * len(places)
    for start, end, members in _spans(places, spare):
        data = memoryview(patience.retried(lambda start=start, end=end: storage.read_range(uri, start, end - start)))
        for number in members:
            place = places[number]
            found[number] = data[place.start - start : place.start - start + place.size]
            if zlib.crc32(found[number]) != place.crc:
                raise UserError(
                    f"{uri}: {names[number]} is damaged (checksum of the bytes from {place.start} on); "
                    "prepare the dataset again"
                )
    return found


def _spans(places: Sequence[Place], spare: float) -> list[tuple[int, int, list[int]]]:
    """Start, end and members (numbers of places) of the ranges to read."""
    starts, sizes = np.array([place[:2] for place in places], np.int64).T
    order = np.argsort(starts)
    ends = np.maximum.accumulate((starts + sizes)[order])
    gaps = np.maximum(starts[order][1:] - ends[:-1], 0)
    narrow = np.argsort(gaps, kind="stable")
    wide = narrow[gaps[narrow].cumsum() > spare * sizes.sum()]
    cuts = np.split(order, np.sort(wide) + 1)
    return [(int(starts[members].min()), int((starts + sizes)[members].max()), members.tolist()) for members in cuts]
