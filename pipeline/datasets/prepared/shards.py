"""Writes a prepared dataset: shard by shard, each with its part of the index, then what completes it.

Order: shards and parts, split lists, index.parquet, dataset.json. Every file is written whole or not at all,
so a writer killed at any point leaves no dataset, and one that is started again keeps the shards of the same
plan.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.prepared import splits
from pipeline.datasets.prepared.dataset import (
    INDEX_FILE,
    INDEX_SCHEMA,
    INFO_FILE,
    SHARD_SCHEMA,
    WRITE_OPTIONS,
    DatasetInfo,
)
from pipeline.datasets.specs import DatasetSpec
from pipeline.errors import UserError

T = TypeVar("T")
GROUP_BYTES = 4 << 20
"""A row group is one request to the storage: large enough to be worth it, small enough to mix many."""
SHARD_BYTES = 128 << 20
SHARD_ROWS = 512
TRAIN_GROUPS = 64
"""Small sets get at least so many row groups, since a batch takes its rows from different ones."""
MIN_SHARDS = {"train": 8, "val": 2}


@dataclass(frozen=True)
class Row:
    """One sample as it is stored."""

    id: str
    image: bytes
    mask: bytes | None
    height: int
    width: int


@dataclass(frozen=True)
class Part:
    """What is known of one written shard."""

    digest: str
    """Hash of the plan it was written by."""
    subset: str
    shard: str
    """Path below the root."""
    size: int
    """Bytes of the shard."""
    index: list[dict[str, Any]]
    """Its rows of the index."""
    bad: dict[str, str]
    """Samples that were left out, by id: which file, and why."""


@dataclass(frozen=True)
class Slot:
    """The place of one shard in a dataset."""

    subset: str
    number: int
    group_rows: int
    """Rows per row group; the last one of the shard may hold fewer."""

    @property
    def shard(self) -> str:
        """Path below the root."""
        return f"shards/{self.subset}-{self.number:05d}.parquet"


def cut(members: Mapping[str, Sequence[T]], mean_bytes: float) -> list[tuple[Slot, Sequence[T]]]:
    """Cuts each subset into shards of whole row groups.

    Row groups hold about 4 MB, but train has at least 64 of them if it has the rows; shards hold at most 512
    rows and 128 MB, but train has at least 8 of them.

    Args:
        members: samples by subset, in the order they are to be stored.
        mean_bytes: about what a sample takes.
    """
    most = max(1, int(GROUP_BYTES / mean_bytes))
    group_rows = min(max(len(members["train"]) // TRAIN_GROUPS, 1), most)
    pieces = []
    for subset, found in members.items():
        limit = min(SHARD_ROWS, int(SHARD_BYTES / mean_bytes), -(-len(found) // MIN_SHARDS[subset]))
        rows = max(1, limit // group_rows) * group_rows
        starts = enumerate(range(0, len(found), rows))
        pieces += [(Slot(subset, number, group_rows), found[start : start + rows]) for number, start in starts]
    return pieces


def _part_uri(root: str, shard: str) -> str:
    return storage.join(root, shard.replace("shards/", "parts/", 1).replace(".parquet", ".json"))


def read_part(root: str, shard: str, digest: str) -> Part | None:
    """The part of a shard that an earlier attempt finished by the same plan."""
    uri = _part_uri(root, shard)
    if not storage.exists(uri):
        return None
    part = Part(**json.loads(storage.read_bytes(uri)))
    return part if part.digest == digest else None


def write_shard(
    root: str, slot: Slot, rows: Sequence[Row], digest: str = "", bad: Mapping[str, str] | None = None
) -> Part:
    """Writes one shard and, after it, its part.

    Args:
        root: the dataset.
        slot: which shard.
        rows: samples in the order they are to be stored.
        digest: hash of the plan.
        bad: samples left out, for the record.
    """
    data = encode_shard(rows, slot.group_rows)
    index = [_index_row(slot, number, row) for number, row in enumerate(rows)]
    part = Part(digest, slot.subset, slot.shard, len(data), index, dict(bad or {}))
    storage.retried(lambda: storage.write_bytes(storage.join(root, slot.shard), data))
    storage.retried(lambda: storage.write_bytes(_part_uri(root, slot.shard), json.dumps(asdict(part)).encode()))
    return part


def encode_shard(rows: Sequence[Row], group_rows: int) -> bytes:
    """A Parquet file of `rows`: uncompressed, no dictionary or statistics, with page checksums."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SHARD_SCHEMA, **WRITE_OPTIONS) as writer:
        for start in range(0, len(rows), group_rows):
            group = [vars(row) for row in rows[start : start + group_rows]]
            writer.write_table(pa.Table.from_pylist(group, SHARD_SCHEMA), row_group_size=group_rows)
    return sink.getvalue().to_pybytes()


def _index_row(slot: Slot, number: int, row: Row) -> dict[str, Any]:
    return {
        "id": row.id,
        "subset": slot.subset,
        "shard": slot.shard,
        "row_group": number // slot.group_rows,
        "row": number % slot.group_rows,
        "image_bytes": len(row.image),
        "mask_bytes": len(row.mask or b""),
        "height": row.height,
        "width": row.width,
    }


def clear(root: str, overwrite: bool) -> None:
    """Makes sure that nothing finished is lost at `root`.

    Raises:
        UserError: a dataset is there and `overwrite` is not set.
    """
    info = storage.join(root, INFO_FILE)
    if not storage.exists(info):
        return
    if not overwrite:
        raise UserError(f"{root}: holds a dataset already; pass --overwrite to replace it")
    for name in (INFO_FILE, INDEX_FILE, "splits", "shards", "parts"):  # first what makes it a dataset
        storage.delete(storage.join(root, name))


def finish(
    root: str,
    parts: Sequence[Part],
    *,
    name: str,
    spec: DatasetSpec,
    seed: int = 0,
    release: tuple[str, str] | None = None,
) -> DatasetInfo:
    """Writes split lists, index and dataset.json: only now the shards are a dataset.

    Args:
        root: the dataset.
        parts: of all shards, train before val.
        name: what the dataset is called.
        spec: classes, palette, evaluation.
        seed: of the generated split lists.
        release: folder and protocol of published lists, which then become the default.

    Raises:
        UserError: see `splits.read_release`.
    """
    index = pa.Table.from_pylist([row for part in parts for row in part.index], INDEX_SCHEMA)
    bad = {key for part in parts for key in part.bad}
    protocol = _write_splits(root, index, seed, release, bad)
    sink = pa.BufferOutputStream()
    pq.write_table(index, sink)
    data = sink.getvalue().to_pybytes()
    storage.write_bytes(storage.join(root, INDEX_FILE), data)
    _sweep(root, {part.shard for part in parts})
    info = DatasetInfo(
        name=name,
        classes=spec.classes,
        palette=spec.palette,
        counts={subset: index["subset"].to_pylist().count(subset) for subset in MIN_SHARDS},
        evaluation=spec.evaluation,
        protocol=protocol,
        index_hash=hashlib.sha256(data).hexdigest(),
        shards={part.shard: part.size for part in parts},
        skipped=len(bad),
    )
    storage.write_bytes(storage.join(root, INFO_FILE), info.to_json().encode())
    storage.delete(storage.join(root, "parts"))
    return info


def _write_splits(root: str, index: pa.Table, seed: int, release: tuple[str, str] | None, dropped: set[str]) -> str:
    """Writes all protocols; returns the default one, or nothing if no image has a mask."""
    roles = splits.sample_roles(index)
    protocols = {name: splits.generate(roles, name, seed) for name in splits.GENERATED}
    if release is not None:
        protocols[release[1]] = splits.read_release(*release, roles, dropped)
    for protocol, lists in protocols.items():
        for split in lists:
            splits.write_split(root, protocol, split)
    default = release[1] if release is not None else splits.GENERATED[0]
    return default if protocols[default] else ""


def _sweep(root: str, shards: set[str]) -> None:
    """Removes shards that an unfinished attempt with another plan left behind."""
    for file in storage.list_files(storage.join(root, "shards")):
        if f"shards/{file}" not in shards:
            storage.delete(storage.join(root, "shards", file))
