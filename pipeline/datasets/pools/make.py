"""Makes a pool, or adds a generation to one, in parallel on Ray; nothing ever holds the whole listing.

1. list: the driver streams the file names below the root into batches (`work/files-N.arrow`).
2. scan: a task per batch finds its images and sorts them by a hash of their id into runs (`work/scan-N.arrow`).
3. settle: a task per run takes what all batches have of it, drops what earlier generations hold, and writes it in the
   order of the hash (`gen-G/keys/N.parquet`).
4. write: the runs, one after another, are cut into parts of equal row groups; a task per part.

Every file is written whole or not at all and kept when prepare is started again; the listing is not repeated. Last
comes pool.json, and `work` is removed.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.cluster import tasks
from pipeline.datasets.pools.pool import (
    BYTES_SCHEMA,
    LINKS_SCHEMA,
    POOL_FILE,
    WORK_FOLDER,
    Generation,
    Pool,
    PoolInfo,
    fetch,
    folder_name,
    open_pool,
    part_name,
)
from pipeline.datasets.pools.sources import POOL_SOURCES, is_addressable, read_images
from pipeline.datasets.prepared.dataset import INFO_FILE, WRITE_OPTIONS
from pipeline.datasets.prepared.prepare import MAX_BAD
from pipeline.datasets.prepared.shards import GROUP_BYTES, MIN_SHARDS, SHARD_BYTES, TRAIN_GROUPS
from pipeline.datasets.raw.photos import BadSampleError, check_image
from pipeline.errors import UserError
from pipeline.storage import Patience

KEYS_PER_RUN = 200_000
"""So many keys a task holds at a time, about."""
LINK_GROUPS = 64
"""Row groups in a part of links: its footer is read with each of them."""
LEAST_ROWS, LEAST_GROUPS = 16, 8
"""Rows per group and groups per part of small pools: later generations may be large, and have the same."""
KEYS_GROUP = 8192
"""Rows per row group of a file of keys."""
FILES_SCHEMA = pa.schema([pa.field("file", pa.string()), pa.field("size", pa.int64())])
KEYS_SCHEMA = LINKS_SCHEMA.append(pa.field("images", pa.int64())).append(pa.field("hash", pa.uint64()))


@dataclass(frozen=True)
class PoolPlan:
    """What one call of prepare is about; the same call, started again, goes on."""

    root: str
    """The pool."""
    source: str
    """A key of `POOL_SOURCES`."""
    images: str
    """Where the files are."""
    kind: str
    """bytes or links."""
    generation: int
    """Number of the one that is made."""

    def work(self, name: str) -> str:
        """URI of a file that is needed only meanwhile."""
        return storage.join(self.root, WORK_FOLDER, name)

    def keys(self, run: int, generation: int | None = None) -> str:
        """URI of a run's keys."""
        number = self.generation if generation is None else generation
        return storage.join(self.root, folder_name(number), "keys", f"{run:04d}.parquet")


@dataclass(frozen=True)
class Listing:
    """What step 1 found."""

    batches: int
    runs: int


@dataclass(frozen=True)
class KeyRun:
    """What step 3 wrote."""

    images: int
    bytes: int
    digest: str


def make_pool(
    source: str,
    images: str,
    out: str,
    *,
    name: str = "",
    copy: bool = False,
    append: bool = False,
    overwrite: bool = False,
    skip_bad: bool = False,
    workers: int | None = None,
) -> Pool:
    """Makes a pool of what lies below `images`, or adds to one what it does not have yet.

    Args:
        source: images, tar or parquet.
        images: path or URI of the files.
        out: path or URI of the pool.
        name: what to call it; empty: the source.
        copy: keep the images in the pool instead of links (always so for parquet).
        append: add a generation to the pool that is there.
        overwrite: replace the pool that is there.
        skip_bad: leave damaged images out instead of stopping; links are not looked into.
        workers: tasks at a time; None: as many as the cluster has CPUs for.

    Returns:
        The pool; with no more generations than before if nothing new was found.

    Raises:
        UserError: see above, no images, a damaged file, or the storage refuses.
    """
    before = _claim(storage.absolute(out), append, overwrite)
    kind = "bytes" if copy or source == "parquet" else "links"
    plan = PoolPlan(
        storage.absolute(out), source, storage.absolute(images), kind, len(before.info.generations) if before else 0
    )
    if f"{plan.root}/".startswith(f"{plan.images}/"):
        raise UserError(f"{plan.root}: lies inside --root {plan.images}; choose a place outside of it")
    if before and (plan.source, plan.images, kind) != (before.info.source, before.info.root, before.info.kind):
        made = f"--source {before.info.source} --root {before.info.root}" + " --copy" * before.info.copied
        raise UserError(f"{plan.root}: was made with {made}; append the same, or make another pool and name both")
    _begin(plan)
    listing = list_images(plan)
    scans = [(plan, listing, number) for number in range(listing.batches)]
    found = sum(tasks.run(_scan, scans, listing.batches, "prepare: %d of %d batches", workers))
    if not found:
        raise UserError(f"{plan.images}: the {'|'.join(POOL_SOURCES[source].suffixes)} files in it hold no images")
    settles = [(plan, listing, number, _earlier(before)) for number in range(listing.runs)]
    runs = list(tasks.run(_settle, settles, listing.runs, "prepare: %d of %d runs", workers))
    total = sum(run.images for run in runs)
    if total:
        size = sum(run.bytes for run in runs)
        info = before.info if before else _layout(plan, name or source, total, size)
        shards = _write_parts(plan, info, runs, skip_bad, workers)
        digest = hashlib.sha256("".join(run.digest for run in runs).encode()).hexdigest()
        added = Generation(rows=total, shards=shards, bytes=size, digest=digest)
        info = replace(info, generations=(*info.generations, added))
        storage.write_bytes(storage.join(plan.root, POOL_FILE), info.to_json().encode())
    else:
        storage.delete(storage.join(plan.root, folder_name(plan.generation)))
    storage.delete(plan.work(""))
    return open_pool(plan.root)


def _claim(root: str, append: bool, overwrite: bool) -> Pool | None:
    """The pool to add to; makes sure that nothing finished is lost at `root`."""
    if append and overwrite:
        raise UserError("--append and --overwrite exclude each other")
    if storage.exists(storage.join(root, INFO_FILE)):
        raise UserError(f"{root}: holds a dataset; choose another place for the pool")
    if append:
        return open_pool(root)
    if storage.exists(storage.join(root, POOL_FILE)):
        if not overwrite:
            raise UserError(f"{root}: holds a pool already; --append adds new images, --overwrite replaces it")
        old = open_pool(root)
        storage.delete(storage.join(root, POOL_FILE))  # first what makes it a pool
        for number in range(len(old.info.generations)):
            storage.delete(storage.join(root, folder_name(number)))
        storage.delete(storage.join(root, WORK_FOLDER))
    return None


def _begin(plan: PoolPlan) -> None:
    """Goes on with what an interrupted call of the same plan left, or clears what another one did."""
    uri, text = plan.work("plan.json"), json.dumps(asdict(plan)).encode()
    if storage.exists(uri) and storage.read_bytes(uri) == text:
        return
    storage.delete(plan.work(""))
    storage.delete(storage.join(plan.root, folder_name(plan.generation)))
    storage.write_bytes(uri, text)


def list_images(plan: PoolPlan) -> Listing:
    """Step 1: streams the file names below the root into batches."""
    done = plan.work("listed.json")
    if storage.exists(done):
        return Listing(**json.loads(storage.read_bytes(done)))
    source = POOL_SOURCES[plan.source]
    named = (each for each in storage.iter_files(plan.images) if each[0].lower().endswith(source.suffixes))
    batches = files = size = odd = 0
    while found := list(islice(named, source.batch)):
        kept = [(file, length) for file, length in found if is_addressable(file)]
        columns = [list(column) for column in zip(*kept, strict=True)] or [[], []]
        write_batches(plan.work(f"files-{batches:07d}.arrow"), [pa.table(columns, schema=FILES_SCHEMA)])
        batches, files, odd = batches + 1, files + len(kept), odd + len(found) - len(kept)
        size += sum(length for _, length in kept)
    if not files:
        raise UserError(f"{plan.images}: no {'|'.join(source.suffixes)} files below it; check --root and --source")
    if odd:
        print(f"left out {odd} files whose names no URI can hold", file=sys.stderr)
    guess = files if plan.source == "images" else size // 20_000
    listing = Listing(batches, min(1000, 1 + guess // KEYS_PER_RUN))
    storage.write_bytes(done, json.dumps(asdict(listing)).encode())
    return listing


def _scan(item: tuple[PoolPlan, Listing, int]) -> int:
    """Step 2, one batch of files; returns how many images it holds."""
    plan, listing, number = item
    uri = plan.work(f"scan-{number:07d}.arrow")
    if not storage.exists(uri):
        files = read_batches(plan.work(f"files-{number:07d}.arrow"))
        find = POOL_SOURCES[plan.source].keys
        keys = [
            (*key, _hash(key[0]))
            for file, size in zip(*(files[name].to_pylist() for name in FILES_SCHEMA.names), strict=True)
            for key in storage.retried(lambda file=file, size=size: list(find(plan.images, file, size)))
        ]
        columns = zip(*keys, strict=True) if keys else [[]] * len(KEYS_SCHEMA)
        arrays = [pa.array(list(column), field.type) for column, field in zip(columns, KEYS_SCHEMA, strict=True)]
        table = pa.table(arrays, schema=KEYS_SCHEMA).sort_by("hash")
        bounds = np.searchsorted(table["hash"].to_numpy(), _bounds(listing.runs))
        slices = [table.slice(a, b - a) for a, b in zip(bounds, [*bounds[1:], len(table)], strict=True)]
        write_batches(uri, slices)
    return int(read_batches(uri)["images"].to_numpy().sum())


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _bounds(runs: int) -> np.ndarray:
    """The smallest hash of each run, uint64 [runs]."""
    return np.array([-(-(run << 64) // runs) for run in range(runs)], np.uint64)


def _earlier(before: Pool | None) -> list[int]:
    """How many files of keys each earlier generation has."""
    if before is None:
        return []
    folders = [storage.join(before.root, folder_name(number), "keys") for number in range(len(before.info.generations))]
    return [len(storage.list_files(folder)) for folder in folders]


def _settle(item: tuple[PoolPlan, Listing, int, list[int]]) -> KeyRun:
    """Step 3 for one run: merges what all batches have of it, without what earlier generations hold."""
    plan, listing, number, earlier = item
    uri = plan.keys(number)
    if not storage.exists(uri):
        scans = (read_batches(plan.work(f"scan-{batch:07d}.arrow"), number) for batch in range(listing.batches))
        table = pa.concat_tables(scans).sort_by([(name, "ascending") for name in ("hash", "id", "offset")])
        ids, known = table["id"].to_pylist(), _known(plan, number / listing.runs, (number + 1) / listing.runs, earlier)
        twice = [False, *(key == previous for previous, key in pairwise(ids))]  # tar files may hold a name twice
        fresh = [place for place, key in enumerate(ids) if key not in known and not twice[place]]
        write_parquet(uri, table.take(pa.array(fresh, pa.int64())), KEYS_GROUP, compression="zstd")
    table = read_parquet(uri, ["id", "size", "images"])
    digest = hashlib.sha256("\n".join(table["id"].to_pylist()).encode()).hexdigest()
    return KeyRun(int(table["images"].to_numpy().sum()), int(table["size"].to_numpy().sum()), digest)


def _known(plan: PoolPlan, start: float, stop: float, earlier: list[int]) -> set[str]:
    """The ids of earlier generations in a part of the hash's range, given as shares of it; perhaps a few more."""
    known: set[str] = set()
    for generation, runs in enumerate(earlier):  # of which there may be more or fewer than now
        for run in range(int(start * runs), min(runs, int(stop * runs) + 1)):
            known.update(read_parquet(plan.keys(run, generation), ["id"])["id"].to_pylist())
    return known


def _layout(plan: PoolPlan, name: str, rows: int, size: int) -> PoolInfo:
    """The sizes of row groups and parts, for this and all later generations; see `shards.cut`."""
    mean = max(1, size // rows)
    group_rows = min(max(rows // TRAIN_GROUPS, LEAST_ROWS), max(1, GROUP_BYTES // mean))
    most = LINK_GROUPS if plan.kind == "links" else max(1, SHARD_BYTES // (mean * group_rows))
    groups = max(-(-rows // (group_rows * MIN_SHARDS["train"])), LEAST_GROUPS)
    return PoolInfo(
        name=name, source=plan.source, root=plan.images, kind=plan.kind, group_rows=group_rows,
        groups_per_shard=min(most, groups), generations=(),
    )  # fmt: skip


def _write_parts(plan: PoolPlan, info: PoolInfo, runs: Sequence[KeyRun], skip_bad: bool, workers: int | None) -> int:
    """Step 4; returns the number of parts."""
    rows, total = info.group_rows * info.groups_per_shard, sum(run.images for run in runs)
    parts = -(-total // rows)
    counts = [run.images for run in runs]
    items = ((plan, info.group_rows, counts, number, rows, skip_bad) for number in range(parts))
    bad: list[str] = []
    for found in tasks.run(_write_part, items, parts, "prepare: %d of %d parts", workers):
        bad += found
        if len(bad) > MAX_BAD and not skip_bad:
            break
    if bad and not skip_bad:
        more = f"; at least {len(bad) - 1} more bad images" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; fix them or pass --skip_bad")
    for text in bad:
        print(f"skipped {text}", file=sys.stderr)
    return parts


def _write_part(item: tuple[PoolPlan, int, list[int], int, int, bool]) -> list[str]:
    """One part; returns what is wrong with its images. If some are bad and may not be skipped, nothing is written."""
    plan, group_rows, counts, number, rows, skip_bad = item
    uri = storage.join(plan.root, part_name(plan.generation, number))
    if storage.exists(uri):
        return []
    pieces = list(_cut(plan, counts, number * rows, (number + 1) * rows))
    if plan.kind == "links":
        table, bad = pa.concat_tables(keys.select(LINKS_SCHEMA.names) for keys, _, _ in pieces), []
    elif plan.source == "parquet":
        table, bad = _checked(pa.concat_tables(_repacked(plan, *piece) for piece in pieces), plan.images)
    else:
        table, bad = _checked(
            pa.concat_tables(fetch(keys, plan.images, Patience()) for keys, _, _ in pieces), plan.images
        )
    if not bad or skip_bad:
        write_parquet(uri, table, group_rows, **WRITE_OPTIONS)
    return bad


def _cut(plan: PoolPlan, counts: list[int], start: int, stop: int) -> Iterator[tuple[pa.Table, int, int]]:
    """The keys that hold the images `start` to `stop` of a generation, run by run.

    Yields:
        Keys, and which of their images: from the first one on, and up to the second one.
    """
    first = 0
    for run, count in enumerate(counts):
        a, b = max(start, first) - first, min(stop, first + count) - first
        if a < b:
            uri = plan.keys(run)
            ends = np.cumsum(read_parquet(uri, ["images"])["images"].to_numpy())
            low, high = int(np.searchsorted(ends, a, "right")), int(np.searchsorted(ends, b, "left")) + 1
            before = int(ends[low - 1]) if low else 0
            groups = range(low // KEYS_GROUP, -(-high // KEYS_GROUP))
            keys = read_parquet(uri, KEYS_SCHEMA.names, groups).slice(low - groups[0] * KEYS_GROUP, high - low)
            yield keys, a - before, b - before
        first += count


def _repacked(plan: PoolPlan, keys: pa.Table, start: int, stop: int) -> pa.Table:
    """The images `start` to `stop` of row groups of Parquet files, in the order of a hash."""
    groups = (read_images(plan.images, key["file"], key["offset"]) for key in keys.to_pylist())
    table = pa.concat_tables(groups).slice(start, stop - start)
    return table.take(np.argsort([_hash(key) for key in table["id"].to_pylist()]))


def _checked(table: pa.Table, root: str) -> tuple[pa.Table, list[str]]:
    """`BYTES_SCHEMA` with nothing for bad images, and what is wrong with those."""
    images, bad = table["image"].to_pylist(), []
    for place, key in enumerate(table["id"].to_pylist()):
        try:
            check_image(images[place])
        except BadSampleError as error:
            bad.append(f"{root}/{key}: {error}")
            images[place] = b""
    return pa.table([table["id"].combine_chunks(), pa.array(images, pa.binary())], schema=BYTES_SCHEMA), bad


# ---- column files -----------------------------------------------------------------------------------------------


def write_batches(uri: str, tables: Sequence[pa.Table]) -> None:
    """An Arrow file with a batch per table (one or more, of one schema), each readable by itself."""
    sink, schema = pa.BufferOutputStream(), tables[0].schema
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for table in tables:
            writer.write_batch(pa.record_batch([c.combine_chunks() for c in table.columns], schema=schema))
    storage.retried(partial(storage.write_bytes, uri, sink.getvalue().to_pybytes()))


def read_batches(uri: str, batch: int | None = None) -> pa.Table:
    """All batches of such a file as one table, or one of them."""

    def read() -> pa.Table:
        filesystem, path = storage.resolve(uri)
        with storage.translated(uri), filesystem.open_input_file(path) as handle:
            file = pa.ipc.open_file(handle)
            numbers = range(file.num_record_batches) if batch is None else [batch]
            return pa.Table.from_batches([file.get_batch(number) for number in numbers])

    return storage.retried(read)


def write_parquet(uri: str, table: pa.Table, group_rows: int, **options: Any) -> None:
    """A Parquet file in row groups of `group_rows`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=group_rows, **options)
    storage.retried(partial(storage.write_bytes, uri, sink.getvalue().to_pybytes()))


def read_parquet(uri: str, columns: Sequence[str], groups: Sequence[int] | None = None) -> pa.Table:
    """Some columns of a Parquet file, of all or some of its row groups."""

    def read() -> pa.Table:
        filesystem, path = storage.resolve(uri)
        with storage.translated(uri), filesystem.open_input_file(path) as handle:
            file = pq.ParquetFile(handle)
            every = range(file.num_row_groups) if groups is None else groups
            return file.read_row_groups(list(every), columns=list(columns), use_threads=False)

    return storage.retried(read)
