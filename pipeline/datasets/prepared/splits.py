"""Which train images count as labeled: lists in files, generated ones, and those of published releases.

`splits/PROTOCOL/SPLIT/labeled.txt` (and `unlabeled.txt`) hold one image a line: an id of the dataset, or a
path or file name that ends in one, so published lists are readable as they are. SPLIT is one of `FRACTIONS`
or any other name.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa

from pipeline import storage
from pipeline.datasets.files import without_suffix
from pipeline.datasets.prepared.dataset import Dataset
from pipeline.errors import UserError

FRACTIONS = {"1_16": 16, "1_8": 8, "1_4": 4, "1_2": 2, "full": 1}
"""One image in so many is labeled."""
GENERATED = ("random", "random_2", "random_3")
"""Protocols that every dataset gets: three draws, since the draw is the largest noise in a comparison."""
RELEASES = {
    "classic": {"92": "1_16", "183": "1_8", "366": "1_4", "732": "1_2", "1464": "full"},
    "blender": {"662": "1_16", "1323": "1_8", "2646": "1_4", "5291": "1_2"},
    "cityscapes": {"186": "1_16", "372": "1_8", "744": "1_4", "1488": "1_2"},
}
"""Published protocols: folder name, which is the number of labeled images, and the split it stands for."""
Roles = Mapping[str, str]
"""What each sample may serve as, by id: `masked` and `bare` (train, with and without mask) or `val`."""


@dataclass(frozen=True)
class Split:
    """The two sides of a semi-supervised run, both out of the train subset."""

    name: str
    """Name of the split, such as 1_16."""
    labeled: tuple[str, ...]
    """Ids whose masks may be used, in the order of the list."""
    unlabeled: tuple[str, ...]
    """Ids whose images may be used; never empty."""
    digest: str
    """First 12 hex digits of the SHA-256 of the sorted labeled ids: equal sets have equal digests."""


def load_split(dataset: Dataset, split: str, protocol: str | None = None) -> Split:
    """Reads and checks a split of `dataset`.

    The unlabeled side is unlabeled.txt; if that is missing or empty, all train images that are not labeled;
    and if there are none either (split `full` of a set whose every image has a mask), all train images.

    Args:
        dataset: an open dataset.
        split: name of a folder of the protocol.
        protocol: name of a folder below `splits`; None: the dataset's default.

    Raises:
        UserError: no such split or protocol (the message names those there are), an id that the dataset
            lacks, that belongs to val or is listed twice, a labeled image without a mask, or an image on both
            sides.
    """
    protocol = protocol or dataset.info.protocol
    folder = storage.join(dataset.root, "splits", protocol, split)
    if not protocol or not storage.exists(storage.join(folder, "labeled.txt")):
        raise UserError(_unknown(dataset.root, protocol, split))
    return read_split(folder, split, sample_roles(dataset.index))


def _unknown(root: str, protocol: str, split: str) -> str:
    """Which part of the name is wrong, and what there is instead."""
    found = list_splits(root)
    if not found:
        return f"{root}: has no split lists; images without masks serve as an unlabeled pool only"
    splits = [name for parent, name in found if parent == protocol]
    if not splits:
        protocols = sorted({parent for parent, _ in found})
        return f"{root}: no protocol {protocol!r}; there are {', '.join(protocols)}"
    return f"{root}: protocol {protocol!r} has no split {split!r}; there are {', '.join(splits)}"


def list_splits(root: str) -> list[tuple[str, str]]:
    """Protocol and name of each split of the dataset at `root`, sorted."""
    files = [PurePosixPath(file).parts for file in storage.list_files(storage.join(root, "splits"))]
    return sorted((parts[0], parts[1]) for parts in files if len(parts) == 3 and parts[2] == "labeled.txt")


def sample_roles(index: pa.Table) -> dict[str, str]:
    """The role of each sample of an index (see `Roles`)."""
    columns = (index[name].to_pylist() for name in ("id", "subset", "mask_bytes"))
    return {
        key: "val" if subset == "val" else "masked" if mask_bytes else "bare"
        for key, subset, mask_bytes in zip(*columns, strict=True)
    }


def read_split(folder: str, name: str, roles: Roles, dropped: Collection[str] = ()) -> Split:
    """Reads labeled.txt and unlabeled.txt in `folder`; see `load_split` for the rules and errors.

    Args:
        folder: a URI.
        name: what the split is called.
        roles: role of each sample.
        dropped: ids that prepare left out; entries that name them are passed over.
    """
    labeled_uri, unlabeled_uri = storage.join(folder, "labeled.txt"), storage.join(folder, "unlabeled.txt")
    labeled = _read_ids(labeled_uri, roles, dropped)
    listed = _read_ids(unlabeled_uri, roles, dropped) if storage.exists(unlabeled_uri) else ()
    if not labeled:
        raise UserError(f"{labeled_uri}: names no image; at least one must be labeled")
    bare = next((key for key in labeled if roles[key] == "bare"), None)
    if bare is not None:
        raise UserError(f"{labeled_uri}: {bare} has no mask, so it cannot be labeled")
    chosen = set(labeled)
    both = next((key for key in listed if key in chosen), None)
    if both is not None:
        raise UserError(f"{unlabeled_uri}: {both} is also in labeled.txt; an image is on one side only")
    return make_split(name, labeled, listed, roles)


def make_split(name: str, labeled: Iterable[str], unlabeled: Iterable[str], roles: Roles) -> Split:
    """A split of checked ids; an empty unlabeled side is filled as `load_split` says."""
    labeled, unlabeled = tuple(labeled), tuple(unlabeled)
    if not unlabeled:
        chosen, train = set(labeled), sorted(key for key, role in roles.items() if role != "val")
        unlabeled = tuple(key for key in train if key not in chosen) or tuple(train)
    digest = hashlib.sha256("\n".join(sorted(labeled)).encode()).hexdigest()[:12]
    return Split(name, labeled, unlabeled, digest)


def _read_ids(uri: str, roles: Roles, dropped: Collection[str]) -> tuple[str, ...]:
    """The ids that the list at `uri` names; all in the train subset and none twice."""
    ids: dict[str, None] = {}
    for entry in storage.read_lines(uri):
        key = find_id(entry, roles)
        if key is None:
            if find_id(entry, dropped) is not None:
                continue
            raise UserError(f"{uri}: {entry} is not in the dataset; prepare it with all images of the list")
        if roles[key] == "val":
            raise UserError(f"{uri}: {key} is a validation image; it must not be trained on")
        if key in ids:
            raise UserError(f"{uri}: {key} is listed twice")
        ids[key] = None
    return tuple(ids)


def find_id(entry: str, ids: Collection[str]) -> str | None:
    """The id that a line of a list means: the line itself, or the end of the path that it is, without its suffix.

    Some releases write the mask's path behind the image's; then the image's counts. A dot or a space is part of a name,
    so an id that is only the beginning of what the line names is never taken.
    """
    return next((found for path in _paths(entry) if (found := _ending(path, ids)) is not None), None)


def _paths(entry: str) -> Iterator[str]:
    """What a line may mean as a whole, in order of trust."""
    yield entry
    for space in re.finditer(r"\s+", entry):
        image, mask = entry[: space.start()], entry[space.end() :]
        if without_suffix(image) != image or ("/" in image and "/" in mask and without_suffix(mask) == mask):
            yield image


def _ending(path: str, ids: Collection[str]) -> str | None:
    if path in ids:
        return path
    parts = without_suffix(path).removesuffix("_leftImg8bit").split("/")
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((tail for tail in tails if tail in ids), None)


def ranked(ids: Iterable[str], key: str) -> list[str]:
    """`ids` in an order that looks random but depends on nothing but `key` and each id itself."""
    return sorted(ids, key=lambda each: hashlib.sha256(f"{key}\0{each}".encode()).digest())


def generate(roles: Roles, protocol: str, seed: int) -> list[Split]:
    """The splits of a generated protocol, a pure function of the arguments; smaller ones lie in larger ones.

    Each split labels the given fraction of the train images that have a mask, rounded down but at least one.
    Returns nothing if none has.
    """
    order = ranked((key for key, role in roles.items() if role == "masked"), f"{protocol}/{seed}")
    if not order:
        return []
    sizes = {name: max(1, len(order) // parts) for name, parts in FRACTIONS.items()}
    return [make_split(name, order[:size], (), roles) for name, size in sizes.items()]


def read_release(folder: str, protocol: str, roles: Roles, dropped: Collection[str] = ()) -> list[Split]:
    """Reads published lists: one folder per split with labeled.txt and perhaps unlabeled.txt.

    Args:
        folder: a URI.
        protocol: one out of `RELEASES` takes that protocol's folders and renames them; of any other, every
            folder is a split of that name.
        roles: role of each sample of the dataset.
        dropped: ids that prepare left out.

    Raises:
        UserError: no such folder, a list of another length than its folder's name says, or see `load_split`.
    """
    files = [PurePosixPath(file).parts for file in storage.list_files(folder)]
    found = sorted({parts[0] for parts in files if len(parts) == 2 and parts[1] == "labeled.txt"})
    names = RELEASES.get(protocol, {name: name for name in found})
    renamed = {name: names.get(name, name) for name in found if name in names or name in names.values()}
    if not renamed:
        wanted = f" for protocol {protocol!r} ({', '.join(names)})" if names else ""
        raise UserError(f"{folder}: no folder with a labeled.txt{wanted}")
    for name in set(renamed) & set(RELEASES.get(protocol, {})):
        uri = storage.join(folder, name, "labeled.txt")
        if len(storage.read_lines(uri)) != int(name):
            raise UserError(f"{uri}: {len(storage.read_lines(uri))} images instead of {name}; get the lists again")
    return [read_split(storage.join(folder, name), split, roles, dropped) for name, split in renamed.items()]


def write_split(root: str, protocol: str, split: Split) -> list[str]:
    """Writes the lists of `split` below `root`, so that `load_split` gives it back; returns their paths there."""
    folder, written = f"splits/{protocol}/{split.name}", []
    for name, ids in (("labeled", split.labeled), ("unlabeled", split.unlabeled)):
        if name == "labeled" or not set(ids) & set(split.labeled):  # `full` may use its labeled images on both sides
            written.append(f"{folder}/{name}.txt")
            storage.write_bytes(storage.join(root, written[-1]), "".join(f"{key}\n" for key in ids).encode())
    return written
