"""Makes a pool, or adds a generation to one, in parallel on Ray; nothing ever holds the whole listing.

1. list: the driver streams the file names below the root into batches (`work/files-N.arrow`).
2. scan: a task per batch finds its images and sorts them by a hash of their id into runs (`work/scan-N.arrow`).
3. settle: a task per run takes what all batches have of it, drops what earlier generations hold, and writes it in the
   order of the hash (`gen-G/keys/N.parquet`).
4. write: the runs, one after another, are cut into parts of equal row groups; a task per part.

Every file is written whole or not at all and kept when prepare is started again; the listing is not repeated. Last
comes pool.json, and `work` is removed.

A pool that replaces another one is written beside it, and pool.json switches. Files are deleted by the names that
prepare gives, and only where pool.json or `work/plan.json` says that it was here.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.cluster import tasks
from pipeline.datasets.files import PICTURE_SUFFIXES, counts_of, escaped, has_suffix, is_junk, is_usable
from pipeline.datasets.pools.columns import read_batches, read_parquet, write_batches, write_parquet
from pipeline.datasets.pools.place import (
    PLAN_FILE,
    PoolPlan,
    check_same,
    claim,
    clear,
    files_below,
    is_written,
    left_plan,
)
from pipeline.datasets.pools.pool import (
    BYTES_SCHEMA,
    LINKS_SCHEMA,
    POOL_FILE,
    Generation,
    Pool,
    PoolInfo,
    fetch,
    folder_name,
    open_pool,
    part_name,
)
from pipeline.datasets.pools.sources import POOL_SOURCES, read_images
from pipeline.datasets.prepared.dataset import WRITE_OPTIONS
from pipeline.datasets.prepared.prepare import MAX_BAD
from pipeline.datasets.prepared.shards import GROUP_BYTES, MIN_SHARDS, SHARD_BYTES, TRAIN_GROUPS
from pipeline.datasets.raw.photos import BadSampleError, check_image
from pipeline.errors import UserError
from pipeline.patience import Patience, retried

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
_LEFT_OUT, _BLANK, _EXAMPLE = b"left out", b"blank", b"example"
"""Keys of the schema metadata: what was left out of a scan and of a part, with one of them."""


@dataclass(frozen=True)
class Listing:
    """What step 1 found."""

    batches: int
    runs: int


@dataclass(frozen=True)
class LeftOut:
    """What did not become an image of the pool, and why, by example."""

    count: int
    example: str


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
    column: str = "",
    workers: int | None = None,
) -> Pool:
    """Makes a pool of what lies below `images`, or adds to one what it does not have yet.

    Args:
        source: images, tar or parquet.
        images: path or URI of the files.
        out: path or URI of the pool: empty, or one that prepare has begun.
        name: what to call it; empty: the source.
        copy: keep the images in the pool instead of links (always so for parquet).
        append: add a generation to the pool that is there.
        overwrite: replace the pool that is there; it stays until the new one is whole.
        skip_bad: leave damaged images out instead of stopping; links are not looked into.
        column: of the images in Parquet files; empty: the one called image, or else the only one of bytes.
        workers: tasks at a time; None: as many as the cluster has CPUs for.

    Returns:
        The pool; with no more generations than before if nothing new was found.

    Raises:
        UserError: see above, no images, a damaged file, or the storage refuses. A mistake in the arguments is told
            before anything is written or deleted.
    """
    root = storage.absolute(out)
    there, left = claim(root, append, overwrite), left_plan(root)
    folders = there.info.folders if there else range(0)
    kind = "bytes" if copy or source == "parquet" else "links"
    replaces = folders.start if overwrite else folders.stop
    plan = PoolPlan(root, source, storage.absolute(images), kind, folders.stop, replaces, column)
    if f"{plan.root}/".startswith(f"{plan.images}/"):
        raise UserError(f"{plan.root}: lies inside --root {plan.images}; choose a place outside of it")
    if there and not append:
        replaced = left is not None and left.replaces < left.generation
        if left and left.generation == folders.start and replaced == overwrite and left.of_the_same(plan):
            clear(left, folders)  # this call was interrupted when it had written pool.json
            return there
        if not overwrite:
            raise UserError(f"{root}: holds a pool already; --append adds new images, --overwrite replaces it")
    before = there if append else None
    if before:
        check_same(before, plan)
    _begin(plan, left, folders)
    listing = list_images(plan)
    found = _find_images(plan, listing, workers)
    if not found:
        clear(plan, folders)  # so that the next call lists the files again
        raise UserError(f"{plan.images}: the {'|'.join(POOL_SOURCES[source].suffixes)} files in it hold no images")
    settles = [(plan, listing, number, _earlier(before)) for number in range(listing.runs)]
    runs = list(tasks.run(_settle, settles, listing.runs, "prepare: %d of %d runs", workers))
    total = sum(run.images for run in runs)
    info = before.info if before else None
    if total:
        size = sum(run.bytes for run in runs)
        info = info or _layout(plan, name or source, total, size)
        shards, blank = _write_parts(plan, info, runs, skip_bad, workers)
        if blank.count == total and not before:
            clear(plan, folders)  # so that the next call looks at the images again
            raise UserError(f"{plan.images}: none of its {total} images can be used; {blank.example}")
        digest = hashlib.sha256("".join(run.digest for run in runs).encode()).hexdigest()
        added = Generation(rows=total, shards=shards, bytes=size, digest=digest, blank=blank.count)
        info = replace(info, generations=(*info.generations, added))
        storage.write_bytes(storage.join(plan.root, POOL_FILE), info.to_json().encode())
    clear(plan, info.folders if info else ())
    return open_pool(plan.root)


def _begin(plan: PoolPlan, left: PoolPlan | None, folders: range) -> None:
    """Goes on with what an interrupted call of the same plan left, or clears what another one did.

    Raises:
        UserError: there are no files to make the pool of; nothing was deleted then.
    """
    if left == plan:
        return
    passed: Counter[str] = Counter()
    if next(_named(plan, passed), None) is None:
        raise _no_files(plan, passed)
    for each in (left, plan):
        if each is not None:
            clear(each, folders, keep_plan=True)
    storage.write_bytes(storage.join(plan.root, PLAN_FILE), json.dumps(asdict(plan)).encode())


# ---- the steps ----------------------------------------------------------------------------------------------------


def _named(plan: PoolPlan, passed: Counter[str]) -> Iterator[tuple[str, int]]:
    """The files that are named as the source's; what systems leave behind is none of them.

    Pictures of kinds that are not read are counted in `passed`, by suffix.
    """
    suffixes = POOL_SOURCES[plan.source].suffixes
    for file, size in storage.iter_files(plan.images):
        if is_junk(file):
            continue
        if has_suffix(file, suffixes):
            yield file, size
        elif plan.source == "images" and has_suffix(file, PICTURE_SUFFIXES):
            passed[PurePosixPath(file).suffix.lower()] += 1


def _no_files(plan: PoolPlan, passed: Counter[str]) -> UserError:
    suffixes = "|".join(POOL_SOURCES[plan.source].suffixes)
    kinds = f" ({counts_of(passed)} are kinds that are not read)" if passed else ""
    return UserError(f"{plan.images}: no {suffixes} files below it{kinds}; check --root and --source")


def list_images(plan: PoolPlan) -> Listing:
    """Step 1: streams the file names below the root into batches.

    Raises:
        UserError: there are none, or no name of them can be used.
    """
    done = plan.work("listed.json")
    if storage.exists(done):
        return Listing(**json.loads(storage.read_bytes(done)))
    passed: Counter[str] = Counter()
    source, named = POOL_SOURCES[plan.source], _named(plan, passed)
    batches = files = size = odd = 0
    example = ""
    while found := list(islice(named, source.batch)):
        kept = [(file, length) for file, length in found if is_usable(file)]
        if len(kept) < len(found):
            example = example or next(file for file, _ in found if not is_usable(file))
        columns = [list(column) for column in zip(*kept, strict=True)] or [[], []]
        write_batches(plan.work(f"files-{batches:07d}.arrow"), [pa.table(columns, schema=FILES_SCHEMA)])
        batches, files, odd = batches + 1, files + len(kept), odd + len(found) - len(kept)
        size += sum(length for _, length in kept)
    if odd:
        print(f"left out {odd} files whose names no URI can hold, such as {escaped(example)}", file=sys.stderr)
    if passed:
        print(f"passed over pictures of kinds that are not read: {counts_of(passed)}", file=sys.stderr)
    if not files:
        raise _no_files(plan, passed)
    guess = files if plan.source == "images" else size // 20_000
    listing = Listing(batches, min(1000, 1 + guess // KEYS_PER_RUN))
    storage.write_bytes(done, json.dumps(asdict(listing)).encode())
    return listing


def _find_images(plan: PoolPlan, listing: Listing, workers: int | None) -> int:
    """Step 2; returns how many images there are, and says what was left out."""
    scans = [(plan, listing, number) for number in range(listing.batches)]
    images, others, example = 0, 0, ""
    for count, left_out in tasks.run(_scan, scans, listing.batches, "prepare: %d of %d batches", workers):
        images, others, example = images + count, others + left_out.count, example or left_out.example
    if others:
        what = "members of tar files that are about another image of their name"
        print(f"left out {others} {what}, such as {example}", file=sys.stderr)
    return images


def _scan(item: tuple[PoolPlan, Listing, int]) -> tuple[int, LeftOut]:
    """Step 2, one batch of files; returns how many images it holds, and what was left out."""
    plan, listing, number = item
    uri = plan.work(f"scan-{number:07d}.arrow")
    if not storage.exists(uri):
        files = read_batches(plan.work(f"files-{number:07d}.arrow"))
        find = POOL_SOURCES[plan.source].keys
        found = [
            (*key, _hash(key[0]))
            for file, size in zip(*(files[name].to_pylist() for name in FILES_SCHEMA.names), strict=True)
            for key in retried(lambda file=file, size=size: list(find(plan.images, file, size, plan.column)))
        ]
        keys, others = [key for key in found if key[4]], [key[0] for key in found if not key[4]]
        columns = zip(*keys, strict=True) if keys else [[]] * len(KEYS_SCHEMA)
        arrays = [pa.array(list(column), field.type) for column, field in zip(columns, KEYS_SCHEMA, strict=True)]
        table = pa.table(arrays, schema=KEYS_SCHEMA).sort_by("hash")
        bounds = np.searchsorted(table["hash"].to_numpy(), _bounds(listing.runs))
        table = _noted(table, _LEFT_OUT, others)
        slices = [table.slice(a, b - a) for a, b in zip(bounds, [*bounds[1:], len(table)], strict=True)]
        write_batches(uri, slices)
    table = read_batches(uri)
    return int(table["images"].to_numpy().sum()), _note(table.schema, _LEFT_OUT)


def _noted(table: pa.Table, key: bytes, left_out: Sequence[str]) -> pa.Table:
    """The table with a note of what was left out of it, for a call that finds it written already."""
    return table.replace_schema_metadata({key: str(len(left_out)), _EXAMPLE: left_out[0] if left_out else ""})


def _note(schema: pa.Schema, key: bytes) -> LeftOut:
    notes = schema.metadata or {}
    return LeftOut(int(notes.get(key, b"0")), notes.get(_EXAMPLE, b"").decode())


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _bounds(runs: int) -> np.ndarray:
    """The smallest hash of each run, uint64 [runs]."""
    return np.array([-(-(run << 64) // runs) for run in range(runs)], np.uint64)


def _earlier(before: Pool | None) -> dict[int, int]:
    """How many files of keys each earlier generation has, by number."""
    if before is None:
        return {}
    files = {number: files_below(storage.join(before.root, folder_name(number))) for number in before.info.folders}
    return {
        number: sum(file.startswith("keys/") and is_written(f"{folder_name(number)}/{file}") for file in found)
        for number, found in files.items()
    }


def _settle(item: tuple[PoolPlan, Listing, int, dict[int, int]]) -> KeyRun:
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


def _known(plan: PoolPlan, start: float, stop: float, earlier: dict[int, int]) -> set[str]:
    """The ids of earlier generations in a part of the hash's range, given as shares of it; perhaps a few more."""
    known: set[str] = set()
    for generation, runs in earlier.items():  # of which there may be more or fewer than now
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
        groups_per_shard=min(most, groups), generations=(), column=plan.column, first=plan.generation,
    )  # fmt: skip


def _write_parts(
    plan: PoolPlan, info: PoolInfo, runs: Sequence[KeyRun], skip_bad: bool, workers: int | None
) -> tuple[int, LeftOut]:
    """Step 4; returns the number of parts, and what has no bytes in them."""
    rows, total = info.group_rows * info.groups_per_shard, sum(run.images for run in runs)
    parts = -(-total // rows)
    counts = [run.images for run in runs]
    items = ((plan, info.group_rows, counts, number, rows, skip_bad) for number in range(parts))
    bad: list[str] = []
    blank, example = 0, ""  # these count what an interrupted call left out, too
    for found, left_out in tasks.run(_write_part, items, parts, "prepare: %d of %d parts", workers):
        bad += found
        blank, example = blank + left_out.count, example or left_out.example
        if len(bad) > MAX_BAD and not skip_bad:
            break
    if bad and not skip_bad:
        more = f"; at least {len(bad) - 1} more bad images" if len(bad) > 1 else ""
        again = f" (after that, {plan.anew})" if plan.source == "tar" else ""  # what lies where has changed then
        raise UserError(f"{bad[0]}{more}; fix them{again} or pass --skip_bad")
    for text in bad:
        print(f"skipped {text}", file=sys.stderr)
    return parts, LeftOut(blank, example)


def _write_part(item: tuple[PoolPlan, int, list[int], int, int, bool]) -> tuple[list[str], LeftOut]:
    """One part; returns what is wrong with images that it looked at, and what has no bytes in the part.

    If some are bad and may not be skipped, nothing is written.
    """
    plan, group_rows, counts, number, rows, skip_bad = item
    uri = storage.join(plan.root, part_name(plan.generation, number))
    if storage.exists(uri):
        there = _note(read_parquet(uri, ["id"], []).schema, _BLANK)
        if skip_bad or not there.count:
            return [], there
    pieces = list(_cut(plan, counts, number * rows, (number + 1) * rows))
    if plan.kind == "links":
        table, bad = pa.concat_tables(keys.select(LINKS_SCHEMA.names) for keys, _, _ in pieces), []
    elif plan.source == "parquet":
        table, bad = _checked(pa.concat_tables(_repacked(plan, *piece) for piece in pieces), plan.images)
    else:
        whole = plan.source == "images"  # a file may have been mended since it was listed
        table, bad = _checked(
            pa.concat_tables(fetch(keys, plan.images, Patience(), whole=whole) for keys, _, _ in pieces), plan.images
        )
    if not bad or skip_bad:
        table = _noted(table, _BLANK, bad)
        write_parquet(uri, table, group_rows, **WRITE_OPTIONS)
    return bad, LeftOut(len(bad), bad[0] if bad else "")


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
    table = pa.concat_tables(_row_group(plan, key) for key in keys.to_pylist()).slice(start, stop - start)
    return table.take(np.argsort([_hash(key) for key in table["id"].to_pylist()]))


def _row_group(plan: PoolPlan, key: dict[str, Any]) -> pa.Table:
    images = read_images(plan.images, key["file"], key["offset"], plan.column)
    if len(images) != key["images"]:
        raise UserError(f"{storage.join(plan.images, key['file'])}: has changed since it was listed; {plan.anew}")
    return images


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
