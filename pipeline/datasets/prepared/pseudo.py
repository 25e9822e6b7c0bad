"""Pseudo-labels of a dataset's images, made once by a trained network and stored beside it.

A set of them is a folder on any storage:

    labels.json                       what made them (`LabelsInfo`); written last: makes the rest a set
    shards/train-00000.parquet, ...   `LABEL_SCHEMA`; the row groups are those of the dataset's shard of that name

The images stay where they are. A row group holds the labeled images of the dataset's row group, in its order.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.prepared.dataset import Dataset, read_group
from pipeline.errors import UserError
from pipeline.patience import Patience
from pipeline.records import read_record

LABELS_FILE = "labels.json"
LABEL_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("label", pa.binary(), nullable=False),  # PNG, one channel of class ids; 255: no label
    ]
)
_DIGEST = b"digest"
"""Key in a shard's metadata: what it was made by."""


@dataclass(frozen=True, kw_only=True)
class LabelsInfo:
    """The content of labels.json."""

    digest: str
    """Hash of all that the labels depend on: images, network, options."""
    index_hash: str
    """That of the dataset's index."""
    images: int
    shards: tuple[str, ...]
    """Paths below the root."""


def open_labels(root: str, dataset: Dataset) -> LabelsInfo:
    """What the labels at `root` are.

    Raises:
        UserError: nothing is there, it is not finished, or the labels are those of another dataset.
    """
    uri = storage.join(root, LABELS_FILE)
    if not storage.exists(uri):
        raise UserError(f"{root}: no pseudo-labels there ({LABELS_FILE} is missing); `u2pl self_training` makes them")
    try:
        info = read_record(LabelsInfo, storage.read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri}: not readable ({error}); make the pseudo-labels again") from error
    if info.index_hash != dataset.info.index_hash:
        raise UserError(f"{root}: pseudo-labels of other images than {dataset.root} holds; make them again")
    return info


def write_info(root: str, info: LabelsInfo) -> None:
    """Makes the shards at `root` a set."""
    storage.write_bytes(storage.join(root, LABELS_FILE), json.dumps(asdict(info), indent=1).encode())


def write_labels(
    root: str, shard: str, groups: Mapping[int, pa.Table], digest: str, patience: Patience | None = None
) -> None:
    """Writes the labels of one shard, whole or not at all.

    Args:
        root: the set.
        shard: path of the dataset's shard below its root.
        groups: `LABEL_SCHEMA` tables by row group; groups without labels may be missing.
        digest: what they were made by.
        patience: with the storage; None: the usual one.
    """
    sink = io.BytesIO()
    schema = LABEL_SCHEMA.with_metadata({_DIGEST: digest.encode()})
    with pq.ParquetWriter(sink, schema, compression="NONE", use_dictionary=False, write_page_checksum=True) as writer:
        for number in range(max(groups) + 1):
            table = groups.get(number, LABEL_SCHEMA.empty_table()).cast(schema)
            writer.write_table(table, row_group_size=max(1, len(table)))
    uri = storage.join(root, shard)
    (patience or Patience()).retried(lambda: storage.write_bytes(uri, sink.getvalue()))


def delete_labels(root: str) -> None:
    """Removes a set, finished or not; first what makes it one."""
    for name in (LABELS_FILE, "shards"):
        storage.delete(storage.join(root, name))


def has_labels(root: str, shard: str, digest: str) -> bool:
    """Whether an earlier attempt wrote this shard, made by the same."""
    uri = storage.join(root, shard)
    if not storage.exists(uri):
        return False
    metadata = pq.read_schema(pa.BufferReader(storage.read_bytes(uri))).metadata or {}
    return metadata.get(_DIGEST) == digest.encode()


def read_labels(
    root: str, shard: str, row_group: int, ids: Sequence[str], patience: Patience | None = None
) -> pa.ChunkedArray:
    """Labels of the images `ids` of a row group: binary, in that order.

    Raises:
        UserError: one has none, or the shard is missing or damaged.
    """
    table = read_group(root, shard, row_group, ["id", "label"], patience)
    place = {name: row for row, name in enumerate(table["id"].to_pylist())}
    missing = next((name for name in ids if name not in place), None)
    if missing is not None:
        raise UserError(f"{root}: no pseudo-label of {missing}; make the pseudo-labels of this split")
    return table["label"].take([place[name] for name in ids])
