"""What the readers of all layouts share: the sample, and listings of image files by name."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class RawSample:
    """One image of a raw tree."""

    id: str
    """Unique in the dataset; split lists name it."""
    subset: str
    """train or val."""
    image_uri: str
    mask_uri: str | None
    """None: unlabeled."""
    label_ids: bool = False
    """Whether the mask holds the dataset's raw label ids (see `Facts.label_ids`) instead of class ids."""


def by_path(folder: str, required: bool = True) -> dict[str, str]:
    """URI of each image file below `folder`, by its path there without the suffix, sorted.

    Raises:
        UserError: two files of one name, or no file although `required`.
    """
    return _keyed(folder, storage.list_files(folder), IMAGE_SUFFIXES, required)


def by_name(folder: str, required: bool = True, suffixes: Collection[str] = IMAGE_SUFFIXES) -> dict[str, str]:
    """URI of each file with one of `suffixes` directly in `folder`, by its name without the suffix, sorted.

    Raises:
        UserError: as `by_path`.
    """
    return _keyed(folder, (file for file in storage.list_files(folder) if "/" not in file), suffixes, required)


def required(masks: dict[str, str], key: str, folder: str) -> str:
    """The mask of the validation image `key`.

    Raises:
        UserError: it has none.
    """
    if key not in masks:
        raise UserError(f"{key}: a validation image without a mask in {folder}")
    return masks[key]


def _keyed(folder: str, files: Iterable[str], suffixes: Collection[str], required: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in files:
        path = PurePosixPath(file)
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        key = str(path.with_suffix(""))
        uri = storage.join(folder, file)
        if key in found:
            raise UserError(f"{uri}: duplicate id {key}, also {found[key]}; rename one of them")
        found[key] = uri
    if required and not found:
        what = "JPEG or PNG" if suffixes is IMAGE_SUFFIXES else "/".join(suffixes)
        raise UserError(f"{folder}: no {what} files there; check --root and --source")
    return found
