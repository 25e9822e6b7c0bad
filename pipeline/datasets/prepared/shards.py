"""Writes a prepared dataset: shard by shard, each with its part of the index, then what completes it.

Order: shards and parts, split lists, index.parquet, dataset.json. Every file is written whole or not at all,
so a writer killed at any point leaves no dataset, and one that is started again keeps the shards of the same plan.
A dataset that is to be replaced stays until then: the new one's shards and index have other names. Nothing is deleted
but files that dataset.json, prepare.json or a part says prepare wrote.
"""

import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.datasets.files import is_junk
from pipeline.datasets.prepared import splits
from pipeline.datasets.prepared.dataset import (
    ATTEMPT_FILE,
    IGNORE_INDEX,
    INDEX_FILE,
    INDEX_SCHEMA,
    INFO_FILE,
    SHARD_SCHEMA,
    WRITE_OPTIONS,
    DatasetInfo,
    open_dataset,
)
from pipeline.datasets.raw.bands import Bands
from pipeline.datasets.specs import DatasetSpec
from pipeline.errors import UserError
from pipeline.patience import retried
from pipeline.records import read_record

T = TypeVar("T")
GROUP_BYTES = 4 << 20
"""A row group is one request to the storage: large enough to be worth it, small enough to mix many."""
SHARD_BYTES = 128 << 20
SHARD_ROWS = 512
TRAIN_GROUPS = 64
"""Small sets get at least so many row groups, since a batch takes its rows from different ones."""
MIN_SHARDS = {"train": 8, "val": 2}
Folder = Literal["shards", "shards-2"]
FOLDERS: tuple[Folder, ...] = ("shards", "shards-2")
"""Where shards lie; a dataset that replaces another one takes the folder that is free."""
_OURS = re.compile(r"(train|val)-\d{5,}\.(parquet|json)")
"""Names that prepare writes into these."""


@dataclass(frozen=True)
class Row:
    """One sample as it is stored."""

    id: str
    image: bytes
    mask: bytes | None
    height: int
    width: int
    pixels: tuple[int, ...] = ()
    """[256], how many pixels of the mask hold each value; empty: no mask, or not counted."""
    moments: tuple[tuple[int, int], ...] = ()
    """Of each band: the sum of its bytes, and that of their squares; empty of RGB."""


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
    pixels: dict[str, int]
    """Pixels of its masks by value."""
    notes: dict[str, int] = field(default_factory=dict)
    """What was done to images, or is odd about them, and to how many."""
    unknown: tuple[str, ...] = ()
    """Values of masks that are no class, as --values writes them."""
    palette: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By class id: the colour that the palettes of its masks give it, 0xRRGGBB, and the first mask that does."""
    moments: list[tuple[int, int]] = field(default_factory=list)
    """Of each band of all its images: the sum of the bytes, and that of their squares; empty of RGB."""


@dataclass(frozen=True)
class Attempt:
    """The content of prepare.json: what is about to be made."""

    plan: str
    """Digest of all that it depends on."""
    folder: Folder
    """Where its shards are."""


@dataclass(frozen=True)
class Slot:
    """The place of one shard in a dataset."""

    subset: str
    number: int
    group_rows: int
    """Rows per row group; the last one of the shard may hold fewer."""
    folder: Folder = FOLDERS[0]
    """Below the root."""

    @property
    def shard(self) -> str:
        """Path below the root."""
        return f"{self.folder}/{self.subset}-{self.number:05d}.parquet"


def cut(
    members: Mapping[str, Sequence[T]], mean_bytes: float, folder: Folder = FOLDERS[0]
) -> list[tuple[Slot, Sequence[T]]]:
    """Cuts each subset into shards of whole row groups.

    Row groups hold about 4 MB, but train has at least 64 of them if it has the rows; shards hold at most 512
    rows and 128 MB, but train has at least 8 of them.

    Args:
        members: samples by subset, in the order they are to be stored.
        mean_bytes: about what a sample takes.
        folder: of the shards, out of `FOLDERS`.
    """
    most = max(1, int(GROUP_BYTES / mean_bytes))
    group_rows = min(max(len(members["train"]) // TRAIN_GROUPS, 1), most)
    pieces = []
    for subset, found in members.items():
        limit = min(SHARD_ROWS, int(SHARD_BYTES / mean_bytes), -(-len(found) // MIN_SHARDS[subset]))
        rows = max(1, limit // group_rows) * group_rows
        starts = enumerate(range(0, len(found), rows))
        pieces += [(Slot(subset, number, group_rows, folder), found[start : start + rows]) for number, start in starts]
    return pieces


def _part_file(shard: str) -> str:
    return shard.removesuffix(".parquet") + ".json"


def read_part(root: str, shard: str, digest: str) -> Part | None:
    """The part of a shard that an earlier attempt finished by the same plan."""
    uri = storage.join(root, _part_file(shard))
    if not storage.exists(uri):
        return None
    try:
        part = read_record(Part, storage.read_bytes(uri))
    except ValueError:  # of another version, or damaged: made anew
        return None
    return part if part.digest == digest else None


def write_shard(root: str, slot: Slot, rows: Sequence[Row], digest: str = "", **facts: Any) -> Part:
    """Writes one shard and, after it, its part.

    Args:
        root: the dataset.
        slot: which shard.
        rows: samples in the order they are to be stored.
        digest: hash of the plan.
        facts: further fields of the part.
    """
    data = encode_shard(rows, slot.group_rows)
    index = [_index_row(slot, number, row) for number, row in enumerate(rows)]
    _locate(data, rows, index)
    counts: NDArray[np.int64] = np.array([row.pixels or [0] * 256 for row in rows], np.int64).reshape(-1, 256).sum(0)
    pixels = {str(value): int(counts[value]) for value in np.flatnonzero(counts)}
    moments = [tuple(map(sum, zip(*each, strict=True))) for each in zip(*(row.moments for row in rows), strict=True)]
    known = {"bad": {}, "pixels": pixels, "moments": moments, **facts}
    part = Part(digest, slot.subset, slot.shard, len(data), index, **known)
    retried(lambda: storage.write_bytes(storage.join(root, slot.shard), data))
    text = json.dumps(asdict(part)).encode()
    retried(lambda: storage.write_bytes(storage.join(root, _part_file(slot.shard)), text))
    return part


def encode_shard(rows: Sequence[Row], group_rows: int) -> bytes:
    """A Parquet file of `rows`: uncompressed, no dictionary or statistics, with page checksums."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SHARD_SCHEMA, **WRITE_OPTIONS) as writer:
        for start in range(0, len(rows), group_rows):
            members = rows[start : start + group_rows]
            group = [{name: getattr(row, name) for name in SHARD_SCHEMA.names} for row in members]
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
        "classes": [value for value, count in enumerate(row.pixels) if count and value != IGNORE_INDEX],
    }


def _locate(data: bytes, rows: Sequence[Row], index: Sequence[dict[str, Any]]) -> None:
    """Adds to the rows of the index where their files lie in the shard: it looks for one after another."""
    at = 0
    for _, members in groupby(zip(rows, index, strict=True), key=lambda member: member[1]["row_group"]):
        group = list(members)
        for column in ("image", "mask"):
            for row, entry in group:
                value = getattr(row, column) or b""
                at = data.index(value, at) if value else at
                entry |= {f"{column}_at": at if value else 0, f"{column}_crc": zlib.crc32(value)}
                at += len(value)


def refuse_existing(root: str, overwrite: bool) -> DatasetInfo | None:
    """The dataset at `root` that is to be replaced, if there is one.

    Raises:
        UserError: there is one and `overwrite` is not set, or it cannot be read.
    """
    if not storage.exists(storage.join(root, INFO_FILE)):
        return None
    if not overwrite:
        raise UserError(f"{root}: holds a dataset already; pass --overwrite to replace it")
    return open_dataset(root).info


def begin(
    root: str, plan: str, *, overwrite: bool, inputs: Sequence[str] = (), protocols: Sequence[str] = ()
) -> Folder:
    """Makes sure that nothing is lost at `root`, and clears what an interrupted attempt by another plan left there.

    Args:
        root: where the dataset is to be.
        plan: digest of what is to be made; an interrupted attempt at the same goes on.
        overwrite: replace a finished dataset.
        inputs: places that are read; their files may lie below `root`.
        protocols: names of the split lists that will be written.

    Returns:
        The folder for the shards, out of `FOLDERS`.

    Raises:
        UserError: a dataset is there and `overwrite` is not set, or files that prepare did not write.
    """
    old = refuse_existing(root, overwrite)
    uri = storage.join(root, ATTEMPT_FILE)
    attempt = _read_attempt(uri)
    if attempt and attempt.plan == plan:
        return attempt.folder
    if attempt:
        left = [f"{attempt.folder}/{file}" for file in storage.list_files(storage.join(root, attempt.folder))]
        ours = [file for file in left if _OURS.fullmatch(file.rpartition("/")[2])]
        _delete(root, set(ours) - set(old.shards if old else ()))
    elif old is None:
        _refuse_foreign(root, inputs)
    used = {shard.rpartition("/")[0] for shard in old.shards} if old else set()
    folder: Folder = next(name for name in FOLDERS if name not in used)
    there = storage.list_files(storage.join(root, folder))
    lists = [f"splits/{name}/{split}/labeled.txt" for name in protocols for split in splits.FRACTIONS]
    lists = [file for file in lists if storage.exists(storage.join(root, file))]
    foreign = [f"{folder}/{file}" for file in there if not is_junk(file)]
    if not attempt and storage.exists(storage.join(root, _index_file(folder))):
        foreign.append(_index_file(folder))
    if not attempt and not (old and not old.lists):  # an attempt may have written them; older versions did not note it
        foreign += sorted(set(lists) - set(old.lists if old else ()))
    if foreign:
        raise UserError(f"{root}/{foreign[0]}: was not written by prepare and is in the way; move it, or choose --out")
    storage.write_bytes(uri, json.dumps(asdict(Attempt(plan, folder))).encode())
    return folder


def _read_attempt(uri: str) -> Attempt | None:
    if not storage.exists(uri):
        return None
    try:
        return read_record(Attempt, storage.read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri}: not readable ({error}); if it is not yours, remove it and prepare again") from error


def _refuse_foreign(root: str, inputs: Sequence[str]) -> None:
    """Refuses a place that holds anything but what is read from it."""
    within = [place.removeprefix(f"{root}/") for place in inputs if f"{place}/".startswith(f"{root}/")]
    if root in within:
        return
    files = (file for file in storage.list_files(root) if not is_junk(file))
    foreign = next((file for file in files if not any(file.startswith(f"{place}/") for place in within)), None)
    if foreign is not None:
        raise UserError(f"{root}: holds files that prepare did not write, such as {foreign}; choose an empty --out")


def _delete(root: str, files: Iterable[str]) -> None:
    """Deletes files, and the folders that they leave empty."""
    folders = set()
    for file in files:
        storage.delete(storage.join(root, file))
        folders.add(file.rpartition("/")[0])
    for folder in filter(None, folders):
        storage.delete_empty(storage.join(root, folder))


def finish(
    root: str,
    parts: Sequence[Part],
    *,
    name: str,
    spec: DatasetSpec,
    seed: int = 0,
    release: tuple[str, str] | None = None,
    bands: Bands | None = None,
) -> DatasetInfo:
    """Writes split lists, index and dataset.json: only now the shards are a dataset. One that was there goes after it.

    Args:
        root: the dataset.
        parts: of all shards, train before val.
        name: what the dataset is called.
        spec: classes, palette, evaluation.
        seed: of the generated split lists.
        release: folder and protocol of published lists, which then become the default.
        bands: what the images are made of, if they are no RGB.

    Raises:
        UserError: see `splits.read_release`.
    """
    old = open_dataset(root).info if storage.exists(storage.join(root, INFO_FILE)) else None
    index = pa.Table.from_pylist([row for part in parts for row in part.index], INDEX_SCHEMA)
    bad = {key for part in parts for key in part.bad}
    protocol, lists = _write_splits(root, index, seed, release, bad)
    sink = pa.BufferOutputStream()
    pq.write_table(index, sink)
    data = sink.getvalue().to_pybytes()
    folder = parts[0].shard.rpartition("/")[0]
    index_file = _index_file(folder)
    storage.write_bytes(storage.join(root, index_file), data)
    info = DatasetInfo(
        name=name,
        classes=spec.classes,
        palette=spec.palette,
        counts={subset: index["subset"].to_pylist().count(subset) for subset in MIN_SHARDS},
        evaluation=spec.evaluation,
        protocol=protocol,
        index_hash=hashlib.sha256(data).hexdigest(),
        shards={part.shard: part.size for part in parts},
        index=index_file,
        lists=tuple(lists),
        masked={subset: _masked(parts, subset) for subset in MIN_SHARDS},
        pixels={subset: _pixels(parts, subset, len(spec.classes)) for subset in MIN_SHARDS},
        skipped=len(bad),
        **(_band_facts(parts, bands) if bands else {}),
    )
    storage.write_bytes(storage.join(root, INFO_FILE), info.to_json().encode())
    stale = {*old.shards, *old.lists, old.index} - {*info.shards, *info.lists, info.index} if old else set()
    _delete(root, [*stale, *(_part_file(part.shard) for part in parts), ATTEMPT_FILE])
    return info


def _band_facts(parts: Sequence[Part], bands: Bands) -> dict[str, Any]:
    """What dataset.json says of bands: mean and deviation are over all pixels of the train images."""
    train = [part for part in parts if part.subset == "train"]
    pixels = sum(row["height"] * row["width"] for part in train for row in part.index)
    sums = np.array([part.moments for part in train if part.moments], np.float64).sum(0) / pixels
    mean = sums[:, 0]
    std = np.sqrt(np.maximum(sums[:, 1] - mean**2, 0.0))
    rounded = tuple(tuple(round(float(value), 3) for value in values) for values in (mean, np.maximum(std, 1.0)))
    return {"bands": bands.chosen, "ranges": bands.ranges, "mean": rounded[0], "std": rounded[1]}


def _index_file(folder: str) -> str:
    """Path of the index that belongs to a folder of shards."""
    return INDEX_FILE.replace(".", folder.removeprefix(FOLDERS[0]) + ".")


def _masked(parts: Sequence[Part], subset: str) -> int:
    return sum(row["mask_bytes"] > 0 for part in parts if part.subset == subset for row in part.index)


def _pixels(parts: Sequence[Part], subset: str, classes: int) -> tuple[int, ...]:
    """Pixels of each class, and of those that are ignored."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part.pixels if part.subset == subset else {})
    return tuple(total[str(value)] for value in [*range(classes), IGNORE_INDEX])


def _write_splits(
    root: str, index: pa.Table, seed: int, release: tuple[str, str] | None, dropped: set[str]
) -> tuple[str, list[str]]:
    """Writes all protocols; returns the default one, or nothing if no image has a mask, and the paths of the lists."""
    roles = splits.sample_roles(index)
    protocols = {name: splits.generate(roles, name, seed) for name in splits.GENERATED}
    if release is not None:
        protocols[release[1]] = splits.read_release(*release, roles, dropped)
    lists = []
    for protocol, found in protocols.items():
        for split in found:
            lists += splits.write_split(root, protocol, split)
    default = release[1] if release is not None else splits.GENERATED[0]
    return default if protocols[default] else "", lists
