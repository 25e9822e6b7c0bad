"""What a pool is: unlabeled images in any number, opened by reading one small file.

A pool is a folder on any storage:

    pool.json                             what it is (`PoolInfo`); written last: makes the rest a pool
    gen-00000/part-0000000.parquet, ...   its rows, in an order by hash; names and counts follow from pool.json
    gen-00000/keys/0000.parquet, ...       which images these are, for `prepare --append`; training never looks

Every row group holds `group_rows` rows but the last one of a generation. There are two kinds: `bytes` keeps the
images in its parts (`BYTES_SCHEMA`), `links` says where they lie (`LINKS_SCHEMA`). A row of bytes that has none was
left out when the pool was made, as its image was damaged; a link without bytes has lost its file since.

Folders are numbered on: a pool that replaces another one begins where that one ended, so that both can lie there.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import pyarrow as pa

from pipeline import storage
from pipeline.datasets.prepared.dataset import SHARD_SCHEMA
from pipeline.errors import UserError
from pipeline.patience import Patience
from pipeline.records import read_record

SCHEMA_VERSION = 1
POOL_FILE = "pool.json"
WORK_FOLDER = "work"
"""Below the pool while prepare is at work."""
FETCHES = 16
"""Linked images that one reader asks for at a time."""
BYTES_SCHEMA = pa.schema([SHARD_SCHEMA.field("id"), SHARD_SCHEMA.field("image")])
LINKS_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),  # path below the pool's `root`
        pa.field("offset", pa.int64(), nullable=False),  # first byte of the image in the file
        pa.field("size", pa.int64(), nullable=False),  # bytes
    ]
)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one call of prepare added."""

    rows: int
    """Images, at least 1."""
    shards: int
    """Files called part-..."""
    bytes: int
    """Size of the encoded images."""
    digest: str
    """Hash of the images' ids."""
    blank: int = 0
    """Rows without bytes: bad images that prepare left out because it was told to. Not known of links."""


@dataclass(frozen=True, kw_only=True)
class PoolInfo:
    """The content of pool.json."""

    name: str
    """For people; means nothing to the program."""
    source: str
    """What it was made of: images, tar or parquet."""
    root: str
    """URI of that; links lead below it."""
    kind: Literal["bytes", "links"]
    """Whether it holds the images."""
    group_rows: int
    """Rows per row group."""
    groups_per_shard: int
    """Row groups per part; the last part of a generation may have fewer."""
    generations: tuple[Generation, ...]
    """Oldest first, at least one."""
    column: str = ""
    """The column of the images in Parquet files, if prepare was told."""
    first: int = 0
    """Number of the first generation's folder."""
    schema_version: int = SCHEMA_VERSION
    """Version of this format."""

    @property
    def folders(self) -> range:
        """Numbers of the generations' folders."""
        return range(self.first, self.first + len(self.generations))

    @property
    def copied(self) -> bool:
        """Whether prepare was told to copy: the images of Parquet files always are."""
        return self.kind == "bytes" and self.source != "parquet"

    def to_json(self) -> str:
        """As text; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "PoolInfo":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: not such a text, or the format is of another version.
        """
        version = read_record(_Version, text).schema_version
        if version != SCHEMA_VERSION:
            raise ValueError(f"format version {version}, this program reads {SCHEMA_VERSION}")
        info = read_record(cls, text)
        possible = all(each.rows >= 1 and 0 <= each.blank <= each.rows for each in info.generations)
        if not info.generations or not possible or info.first < 0:
            raise ValueError("an impossible value")
        return info


@dataclass(frozen=True)
class _Version:
    schema_version: int


@dataclass(frozen=True)
class Pool:
    """A cheap, picklable handle: where the pool is and what it is."""

    root: str
    """URI without a trailing slash, valid in every working directory."""
    info: PoolInfo
    """The content of pool.json."""

    @property
    def summary(self) -> str:
        """How large it is, for people."""
        count, last = len(self.info.generations), self.info.generations[-1]
        blank = sum(each.blank for each in self.info.generations)
        left_out = f", {blank} left out," if blank else ""
        return (
            f"{self.images(count)} images{left_out} in {count} generations, {last.rows - last.blank} in the last; "
            f"{self.info.kind}"
        )

    def images(self, generations: int) -> int:
        """How many images the first `generations` generations hold, without those that were left out."""
        return sum(each.rows - each.blank for each in self.info.generations[:generations])

    def digest(self, generations: int) -> str:
        """12 hex digits that tell the first `generations` generations from those of any other pool.

        In which folders they lie does not count.
        """
        values = asdict(self.info)
        values["generations"] = values["generations"][:generations]
        del values["first"]
        for each, key in [(values, "column"), *((each, "blank") for each in values["generations"])]:
            if not each[key]:  # as in pools from before there were these
                del each[key]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def open_pool(root: str) -> Pool:
    """Opens the pool at `root` (a path or URI); reads pool.json and nothing else.

    Raises:
        UserError: nothing is there, prepare did not finish, or the format is of another version.
    """
    root = storage.absolute(root)
    uri = storage.join(root, POOL_FILE)
    if not storage.exists(uri):
        if storage.exists(storage.join(root, WORK_FOLDER, "plan.json")):
            raise UserError(f"{root}: prepare did not finish; run it again")
        raise UserError(f"{root}: no pool there ({POOL_FILE} is missing); make one with `u2pl prepare`")
    try:
        return Pool(root, PoolInfo.from_json(storage.read_bytes(uri)))
    except ValueError as error:
        raise UserError(f"{uri}: not readable ({error}); prepare the pool again") from error


def folder_name(generation: int) -> str:
    """Path of a generation below the pool."""
    return f"gen-{generation:05d}"


def part_name(generation: int, number: int) -> str:
    """Path of a part below the pool."""
    return f"{folder_name(generation)}/part-{number:07d}.parquet"


def fetch(links: pa.Table, root: str, patience: Patience, *, whole: bool = False) -> pa.Table:
    """Reads linked images, several at a time; brief trouble of the storage is waited for.

    Args:
        links: `LINKS_SCHEMA`.
        root: what their files are below.
        patience: for how long.
        whole: read each file to its end, whatever size it was of.

    Returns:
        `BYTES_SCHEMA`, in the same order; no bytes for an image that has vanished.

    Raises:
        UserError: the storage refuses.
    """
    places = (links[name].to_pylist() for name in ("file", "offset", "size"))
    with ThreadPoolExecutor(FETCHES) as pool:
        images = list(pool.map(partial(_fetch, root, patience, whole), *places))
    return pa.table([links["id"].combine_chunks(), pa.array(images, pa.binary())], schema=BYTES_SCHEMA)


def _fetch(root: str, patience: Patience, whole: bool, file: str, offset: int, size: int) -> bytes:
    uri = storage.join(root, file)
    try:
        return patience.retried(lambda: storage.read_bytes(uri) if whole else storage.read_range(uri, offset, size))
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        return b""
