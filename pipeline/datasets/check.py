"""Looks through a prepared dataset: what is in it, what is odd, and what is wrong.

Row groups are read a few at a time; of a sample only a hash and the classes of its mask are kept.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pipeline import storage
from pipeline.datasets.images import DecodeError, decode_image, decode_mask, orientation, read_header, shown
from pipeline.datasets.prepared.dataset import SUBSETS, Dataset, read_group
from pipeline.datasets.prepared.shards import FOLDERS
from pipeline.datasets.prepared.splits import Split, list_splits, read_split, sample_roles
from pipeline.errors import UserError

THREADS = 4
PICTURES = 8
"""Samples to show, evenly over those with a mask; odd ones come on top."""
ODD_PICTURES = 2
NAMED = 5
"""So many samples of a kind are named, the others counted."""
SIDE = 320
"""Pixels of a picture's longer side, at most."""
Positions = NDArray[np.int64]
"""Rows of the index."""


@dataclass(frozen=True, eq=False)
class SubsetReport:
    """What is in train or in val."""

    name: str
    images: int
    masked: int
    """Of them with a mask."""
    image_bytes: int
    mask_bytes: int
    sizes: list[tuple[str, int]]
    """The commonest sizes, as WIDTHxHEIGHT, and how many images have each."""
    pixels: NDArray[np.int64]
    """[C+1]: by class id; the last are the ignored ones."""
    images_with: NDArray[np.int64]
    """[C]: images that hold the class."""


@dataclass(frozen=True)
class SplitReport:
    """What is in one split."""

    protocol: str
    name: str
    labeled: int
    unlabeled: int
    both: int
    """Images on both sides."""
    copies: int
    """Labeled images of which the unlabeled side holds an exact copy under another id."""
    in_larger: int | None
    """Labeled images that the protocol's next larger split labels as well; None: this is the largest."""
    absent: tuple[str, ...]
    """Classes that no labeled image shows."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A sample to look at."""

    id: str
    note: str
    """Why it is shown."""
    image: NDArray[np.uint8]
    """[h,w,3], shrunk."""
    mask: NDArray[np.uint8]
    """[h,w] class ids and 255."""


@dataclass(frozen=True, eq=False)
class Report:
    """What `check` found."""

    dataset: Dataset
    subsets: list[SubsetReport]
    splits: list[SplitReport]
    problems: list[str]
    """What is wrong: prepare the dataset again."""
    oddities: list[str]
    """What may be wrong in the raw data."""
    pictures: list[Picture]


class _Scan(NamedTuple):
    """What the bytes of a row group, or of all, say."""

    hashes: NDArray[np.uint64]
    """[N] of the image files; 0 where not read."""
    counts: NDArray[np.int64]
    """[N,C+1] pixels by class id of each mask, the last are the ignored ones; all 0 without a mask."""
    turned: NDArray[np.bool_]
    """[N] whether an image with a mask carries an EXIF rotation, which nothing applies."""
    problems: list[str]


def check(dataset: Dataset) -> Report:
    """Reads all of `dataset` once.

    Raises:
        UserError: the storage refuses.
    """
    index = dataset.index
    lost, problems, oddities = _check_shards(dataset)
    classes, total = len(dataset.info.classes), len(index)
    hashes, shows, turned = np.zeros(total, np.uint64), np.zeros((total, classes), bool), np.zeros(total, bool)
    subset_of = np.array([SUBSETS.index(name) for name in index["subset"].to_pylist()])
    pixels = np.zeros((len(SUBSETS), classes + 1), np.int64)
    groups = [rows for rows in row_groups(dataset) if index["shard"][rows[0]].as_py() not in lost]
    for rows, scan in _scans(dataset, groups):
        hashes[rows], shows[rows], turned[rows] = scan.hashes, scan.counts[:, :classes] > 0, scan.turned
        np.add.at(pixels, subset_of[rows], scan.counts)
        problems += scan.problems
    masked = (index["mask_bytes"].to_numpy() > 0) & (hashes != 0)
    odd = {
        "only ignored pixels": np.flatnonzero(masked & (shows.sum(1) == 0)),
        "a single class": np.flatnonzero(masked & (shows.sum(1) == 1)),
    }
    problems += _unseen(dataset, pixels.sum(0))
    if turned.any():
        named = _names(dataset, np.flatnonzero(turned))
        oddities.append(f"{turned.sum()} images with a mask carry an EXIF rotation that is not applied: {named}")
    oddities += [f"{len(rows)} masks hold {kind}: {_names(dataset, rows)}" for kind, rows in odd.items() if len(rows)]
    copies = _copies(hashes, index["image_bytes"].to_numpy())
    leaks = [rows for rows in copies if len(set(subset_of[rows])) > 1]
    if leaks:
        problems.append(f"{len(leaks)} images are both in train and in val, first {_names(dataset, leaks[0])}")
    if copies:
        extra = sum(map(len, copies)) - len(copies)
        oddities.append(f"{extra} images are exact copies of others, first {_names(dataset, copies[0])}")
    splits, broken = _check_splits(dataset, shows, copies)
    subsets = [_subset(dataset, name, pixels[at], shows[subset_of == at]) for at, name in enumerate(SUBSETS)]
    pictures = _pictures(dataset, np.flatnonzero(masked), odd)
    return Report(dataset, subsets, splits, problems + broken, oddities, pictures)


def _check_shards(dataset: Dataset) -> tuple[set[str], list[str], list[str]]:
    """Compares the files with dataset.json: which shards are missing, what is wrong, and what is odd."""
    there = {
        f"{folder}/{name}": size
        for folder in FOLDERS
        for name, size in storage.file_sizes(storage.join(dataset.root, folder)).items()
    }
    known = dataset.info.shards
    lost = {shard for shard in known if shard not in there}
    problems = [f"{shard} is missing" for shard in sorted(lost)]
    problems += [
        f"{shard} has {there[shard]} bytes instead of {size}"
        for shard, size in known.items()
        if there.get(shard, size) != size
    ]
    return lost, problems, [f"{shard} belongs to no dataset" for shard in there if shard not in known]


def row_groups(dataset: Dataset) -> list[Positions]:
    """The rows of the index that each row group holds, in stored order."""
    shard = dataset.index["shard"].combine_chunks().dictionary_encode().indices.to_numpy()
    group, row = (dataset.index[name].to_numpy() for name in ("row_group", "row"))
    order = np.lexsort((row, group, shard))
    starts = (np.diff(shard[order]) != 0) | (np.diff(group[order]) != 0)
    return np.split(order, np.flatnonzero(starts) + 1)


def _scans(dataset: Dataset, groups: Sequence[Positions]) -> Iterator[tuple[Positions, _Scan]]:
    pool = ThreadPoolExecutor(THREADS)
    try:
        scans = pool.map(lambda rows: _scan(dataset, rows), groups)
        yield from zip(groups, tqdm(scans, total=len(groups), desc="check", unit="group", disable=None), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _scan(dataset: Dataset, rows: Positions) -> _Scan:
    classes = len(dataset.info.classes)
    counts = np.zeros((len(rows), classes + 1), np.int64)
    scan = _Scan(np.zeros(len(rows), np.uint64), counts, np.zeros(len(rows), bool), [])
    try:
        table = _read(dataset, rows, ["id", "image", "mask", "height", "width"])
    except UserError as error:  # what was read of the others is worth reporting
        return scan._replace(problems=[str(error).removeprefix(f"{dataset.root}/")])
    for at, row in enumerate(table):
        scan.hashes[at] = np.frombuffer(hashlib.blake2b(row["image"], digest_size=8).digest(), np.uint64)[0] | 1
        if row["mask"] is None:
            continue
        scan.turned[at] = _is_turned(row["image"])
        try:
            mask = decode_mask(row["mask"])
        except DecodeError as error:
            scan.problems.append(f"{row['id']}: unreadable mask ({error})")
            continue
        if mask.shape != (row["height"], row["width"]):
            scan.problems.append(f"{row['id']}: mask is {mask.shape[1]}x{mask.shape[0]}, its image another size")
        found = np.bincount(mask.ravel(), minlength=256)
        scan.counts[at, :classes], scan.counts[at, classes] = found[:classes], found[dataset.info.ignore_index]
        if found.sum() != scan.counts[at].sum():
            scan.problems.append(f"{row['id']}: mask holds a value that is no class id")
    return scan


def _is_turned(image: bytes) -> bool:
    try:
        return orientation(read_header(image)) != 1
    except DecodeError:  # which prepare has refused, and training will tell
        return False


def _unseen(dataset: Dataset, pixels: NDArray[np.int64]) -> list[str]:
    """The commonest mistake of masks: 0 and 255, of which 255 was meant to be the class and is ignored."""
    *shown, ignored = pixels.tolist()
    if ignored == 0 or np.count_nonzero(shown) > 1:
        return []
    advice = "; if it is a class: --values 0=0,255=1" if len(shown) == 2 else "; if it is a class, say so with --values"
    unseen = [name for name, count in zip(dataset.info.classes, shown, strict=True) if not count]
    share = f"{100 * ignored / pixels.sum():.0f} % of the pixels are {dataset.info.ignore_index}, which is ignored"
    return [f"no mask has a pixel of {', '.join(unseen[:NAMED])}; {share}{advice}"]


def _read(dataset: Dataset, rows: Positions, columns: list[str]) -> list[dict]:
    """The samples at `rows` of the index, which are all in one row group."""
    places = dataset.index.take(rows).to_pylist()
    table = read_group(dataset.root, places[0]["shard"], places[0]["row_group"], columns)
    inside = [place["row"] for place in places]
    if max(inside) >= len(table) or table["id"].take(inside).to_pylist() != [place["id"] for place in places]:
        raise UserError(f"{places[0]['shard']}: row group {places[0]['row_group']} holds other ids than the index says")
    return table.take(inside).to_pylist()


def _copies(hashes: NDArray[np.uint64], sizes: NDArray[np.int64]) -> list[Positions]:
    """Rows of equal images, for each image that is there more than once; by hash and size, as hashes are short."""
    order = np.lexsort((sizes, hashes))
    order = order[hashes[order] != 0]
    starts = (np.diff(hashes[order]) != 0) | (np.diff(sizes[order]) != 0)
    return [np.sort(rows) for rows in np.split(order, np.flatnonzero(starts) + 1) if len(rows) > 1]


def _names(dataset: Dataset, rows: Positions) -> str:
    named = ", ".join(dataset.index["id"].take(rows[:NAMED]).to_pylist())
    return f"{named} and {len(rows) - NAMED} more" if len(rows) > NAMED else named


def _check_splits(
    dataset: Dataset, shows: NDArray[np.bool_], copies: Sequence[Positions]
) -> tuple[list[SplitReport], list[str]]:
    """The facts of each readable split, and what is wrong with the others."""
    roles = sample_roles(dataset.index)
    splits: dict[tuple[str, str], Split] = {}
    broken = []
    lists = {f"splits/{file}" for file in storage.list_files(storage.join(dataset.root, "splits"))}
    broken += [f"{name} is missing" for name in sorted(set(dataset.info.lists) - lists)]
    for protocol, name in list_splits(dataset.root):
        try:
            splits[protocol, name] = read_split(storage.join(dataset.root, "splits", protocol, name), name, roles)
        except UserError as error:
            broken.append(str(error).removeprefix(f"{dataset.root}/"))
    ids = dataset.index["id"].to_pylist()
    twins = {ids[row]: {ids[other] for other in rows if other != row} for rows in copies for row in rows}
    row_of = {key: row for row, key in enumerate(ids)}
    order = sorted(splits, key=lambda key: (key[0], len(splits[key].labeled)))
    larger = {key: splits[following] for key, following in pairwise(order) if key[0] == following[0]}
    facts = []
    for key in order:
        seen = shows[[row_of[each] for each in splits[key].labeled]].sum(0)
        absent = tuple(name for name, there in zip(dataset.info.classes, seen, strict=True) if not there)
        facts.append(_split(key[0], splits[key], larger.get(key), twins, absent))
    return facts, broken


def _split(
    protocol: str, split: Split, larger: Split | None, twins: Mapping[str, set[str]], absent: tuple[str, ...]
) -> SplitReport:
    labeled, unlabeled = set(split.labeled), set(split.unlabeled)
    away = unlabeled - labeled
    return SplitReport(
        protocol,
        split.name,
        labeled=len(labeled),
        unlabeled=len(unlabeled),
        both=len(labeled & unlabeled),
        copies=sum(bool(twins[each] & away) for each in labeled & twins.keys()),
        in_larger=None if larger is None else len(labeled.intersection(larger.labeled)),
        absent=absent,
    )


def _subset(dataset: Dataset, name: str, pixels: NDArray[np.int64], shows: NDArray[np.bool_]) -> SubsetReport:
    table = dataset.subset(name)
    sizes = Counter(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
    return SubsetReport(
        name,
        images=len(table),
        masked=int(np.count_nonzero(table["mask_bytes"].to_numpy())),
        image_bytes=int(table["image_bytes"].to_numpy().sum()),
        mask_bytes=int(table["mask_bytes"].to_numpy().sum()),
        sizes=[(f"{width}x{height}", count) for (width, height), count in sizes.most_common(NAMED)],
        pixels=pixels,
        images_with=shows.sum(0),
    )


def _pictures(dataset: Dataset, masked: Positions, odd: dict[str, Positions]) -> list[Picture]:
    """Reads what is to be shown again: the scan keeps no pixels."""
    spread = masked[np.unique(np.linspace(0, len(masked) - 1, min(PICTURES, len(masked))).astype(int))]
    chosen = [(row, "") for row in spread]
    chosen += [(row, kind) for kind, rows in odd.items() for row in rows[:ODD_PICTURES]]
    return [picture for row, note in chosen for picture in _picture(dataset, row, note)]


def _picture(dataset: Dataset, row: np.int64, note: str) -> Collection[Picture]:
    """One picture, or none if the image is damaged."""
    (sample,) = _read(dataset, np.array([row]), ["id", "image", "mask"])
    try:
        image = Image.fromarray(shown(decode_image(sample["image"])))
        mask = Image.fromarray(decode_mask(sample["mask"]))
    except DecodeError:
        return []
    share = min(1.0, SIDE / max(image.size))
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    small = image.resize(size, Image.Resampling.BOX), mask.resize(size, Image.Resampling.NEAREST)
    return [Picture(sample["id"], note, np.asarray(small[0]), np.asarray(small[1]))]
