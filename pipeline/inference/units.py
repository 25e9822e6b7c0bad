"""The images that masks are asked for: a folder of files, a pool or a dataset, cut into units of work."""

import hashlib
import posixpath
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow.compute as pc

from pipeline import storage
from pipeline.datasets.files import (
    IMAGE_SUFFIXES,
    PICTURE_SUFFIXES,
    counts_of,
    escaped,
    has_suffix,
    is_junk,
    is_usable,
    without_suffix,
)
from pipeline.datasets.pools.pool import FETCHES, POOL_FILE, Pool, open_pool
from pipeline.datasets.prepared.dataset import INFO_FILE, Dataset, open_dataset, read_group
from pipeline.errors import UserError
from pipeline.inference.evaluate import ahead
from pipeline.ingest.groups import Group, PoolTable, select_groups
from pipeline.ingest.read import read_rows
from pipeline.patience import Patience

UNIT_IMAGES = 32
"""Images that make a unit full; one of a pool or dataset ends with its row group."""


class Unit(NamedTuple):
    """Some images, in a fixed order."""

    number: int
    root: str
    """What the files are below."""
    ids: tuple[str, ...]
    """Paths of the files below `root`, or what the pool or dataset calls the images; for people where there is no
    name."""
    names: tuple[str, ...]
    """Under which the results are written, in the order of `ids`; empty where no file can have the name."""
    groups: tuple[Group, ...]
    """The rows that hold the images, in this order; empty if they are files."""


@dataclass(frozen=True)
class Listing:
    """All images that masks are asked for."""

    root: str
    """URI of the folder, pool or dataset."""
    units: Sequence[Unit]
    digest: str
    """Hash of names and contents: their sizes for files, what is known of a pool or dataset."""
    passed: Counter[str]
    """Pictures of kinds that are not read, by suffix."""


class _Piece(NamedTuple):
    """What becomes a unit."""

    ids: Sequence[str]
    groups: tuple[Group, ...]
    content: str
    """Tells it from another one with the same ids."""


def list_images(images: str, subset: str | None = None, *, flat: bool = False) -> Listing:
    """Finds the images and cuts them into units; opens no image.

    Args:
        images: path or URI of a folder of files, of a pool, or of a dataset.
        subset: of a dataset train, val, or unlabeled, which are the train images without a mask; None: all its images.
        flat: folders become a part of the name, `a/b.jpg` is `a__b`.

    Raises:
        UserError: there are none, or two would be written under one name.
    """
    root, passed = storage.absolute(images), Counter[str]()
    is_pool = storage.exists(storage.join(root, POOL_FILE))
    is_dataset = not is_pool and storage.exists(storage.join(root, INFO_FILE))
    if subset and not is_dataset:
        raise UserError(f"--subset {subset}: {root} is no prepared dataset; leave it out")
    if is_pool:
        pieces = _of_pool(open_pool(root))
    elif is_dataset:
        pieces = _of_dataset(open_dataset(root), subset)
    else:
        pieces = _of_folder(root, passed)
    units, sha = [], hashlib.sha256()
    known: dict[str, str] = {}
    for number, piece in enumerate(pieces):
        names = tuple(name_of(key, flat=flat) for key in piece.ids)
        for key, name in zip(piece.ids, names, strict=True):
            if name and known.setdefault(name, key) != key:
                raise UserError(f"{root}: {known[name]} and {key} would both be written as {name}; rename one of them")
        ids = tuple(key if name else escaped(key) for key, name in zip(piece.ids, names, strict=True))
        units.append(Unit(number, root, ids, names, piece.groups))
        sha.update(repr((ids, names, piece.content)).encode())
    found = Listing(root, units, sha.hexdigest(), passed)
    if not units:
        why = f" ({counts_of(passed)} are kinds that are not read)" if passed else ""
        raise UserError(f"{root}: no {f'{subset} ' if subset else ''}images there{why}; check --images")
    return found


def read_images(unit: Unit, patience: Patience, wanted: Collection[str] | None = None) -> Iterator[tuple[int, bytes]]:
    """Places in the unit and the encoded bytes, one file or row group ahead of the reader.

    Args:
        unit: whose images.
        patience: with the storage.
        wanted: names of those to read; None: all that have one.

    Yields:
        No bytes for a file that has vanished, and for what a pool has left out.

    Raises:
        UserError: a shard is damaged, or the storage refuses.
    """
    places = [at for at, name in enumerate(unit.names) if (name if wanted is None else name in wanted)]
    if unit.groups:
        tables = ahead(lambda group: read_rows(group, None, patience), unit.groups)
        images = (image for table in tables for image in table["image"])
        chosen = set(places)
        yield from ((at, image.as_py()) for at, image in enumerate(images) if at in chosen)
    else:
        yield from ahead(partial(_file, unit, patience), places)


def _file(unit: Unit, patience: Patience, at: int) -> tuple[int, bytes]:
    uri = storage.join(unit.root, unit.ids[at])
    try:
        return at, patience.retried(lambda: storage.read_bytes(uri))
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        return at, b""


def name_of(key: str, *, flat: bool = False) -> str:
    """What the file of an image's result is called, without its suffix; empty if no file can have the name."""
    path = posixpath.normpath(key)  # members of tar files are often called ./x.jpg
    name = without_suffix(path) if is_usable(path) else ""
    return name.replace("/", "__") if flat else name


def _of_folder(root: str, passed: Counter[str]) -> Iterator[_Piece]:
    if storage.exists(root):
        raise UserError(f"{root}: is a file; name the folder that it lies in")
    found = []
    for file, size in storage.iter_files(root):
        if is_junk(file):
            continue
        if has_suffix(file, IMAGE_SUFFIXES):
            found.append((file, size))
        elif has_suffix(file, PICTURE_SUFFIXES):
            passed[PurePosixPath(file).suffix.lower()] += 1
    found.sort()
    for start in range(0, len(found), UNIT_IMAGES):
        files, sizes = zip(*found[start : start + UNIT_IMAGES], strict=True)
        yield _Piece(files, (), repr(sizes))


def _of_pool(pool: Pool) -> Iterator[_Piece]:
    count = len(pool.info.generations)
    table = PoolTable(pool, count)
    groups = [table[number] for number in range(len(table))]
    with ThreadPoolExecutor(FETCHES) as threads:
        ids = threads.map(_ids, groups)
        yield from _pieces(zip(groups, ids, strict=True), pool.digest(count))


def _ids(group: Group) -> Sequence[str]:
    return read_group(group.root, group.shard, group.row_group, ["id"])["id"].to_pylist()


def _of_dataset(dataset: Dataset, subset: str | None) -> Iterator[_Piece]:
    rows = dataset.index
    if subset == "unlabeled":
        rows = rows.filter((pc.field("subset") == "train") & (pc.field("mask_bytes") == 0))
    elif subset:
        rows = dataset.subset(subset)
    groups = select_groups(dataset, rows["id"].to_pylist())
    yield from _pieces(((group, group.ids) for group in groups), dataset.info.index_hash)


def _pieces(found: Iterator[tuple[Group, Sequence[str]]], content: str) -> Iterator[_Piece]:
    """Whole row groups, as many as make a unit full."""
    ids: list[str] = []
    groups: list[Group] = []
    for group, own in found:
        ids += own
        groups.append(group)
        if len(ids) >= UNIT_IMAGES:
            yield _Piece(ids, tuple(groups), content)
            ids, groups = [], []
    if ids:
        yield _Piece(ids, tuple(groups), content)
