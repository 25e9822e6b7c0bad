"""Layouts without lists: folders of images beside folders of masks, and equal file names make a pair."""

from pipeline import storage
from pipeline.datasets.readers.tree import RawSample, by_name, by_path, required
from pipeline.errors import UserError


def read_camvid(root: str) -> list[RawSample]:
    """Reads a tree of the `camvid` layout; void is 11 there, see `Facts.label_ids`.

    Args:
        root: the folder that holds train, trainannot, val and valannot.

    Raises:
        UserError: no images, a val image without a mask, or a mask without an image.
    """
    subsets = ("train", "val")
    return [each for name in subsets for each in _pairs(root, name, name, f"{name}annot", label_ids=True)]


def read_ade20k(root: str) -> list[RawSample]:
    """Reads a tree of the `ade20k` layout; 0 is no class there, see `Facts.label_ids`.

    Args:
        root: the folder that holds images and annotations.

    Raises:
        UserError: no images, a val image without a mask, or a mask without an image.
    """
    subsets = {"train": "training", "val": "validation"}
    return [
        each
        for subset, name in subsets.items()
        for each in _pairs(root, subset, f"images/{name}", f"annotations/{name}", label_ids=True)
    ]


def _pairs(root: str, subset: str, images: str, masks: str, label_ids: bool) -> list[RawSample]:
    found = by_name(storage.join(root, images))
    known = by_name(storage.join(root, masks), required=False)
    _no_orphans(known, found, images)
    return [RawSample(key, subset, uri, _mask(known, key, subset, masks), label_ids) for key, uri in found.items()]


def read_folder(root: str) -> list[RawSample]:
    """Reads a tree of the `folder` layout.

    Args:
        root: the folder that holds images and perhaps masks.

    Raises:
        UserError: no images, a val image without a mask, or a mask without an image.
    """
    images = by_path(storage.join(root, "images"))
    masks = by_path(storage.join(root, "masks"), required=False)
    subsets = {key: key.partition("/")[0] for key in images}
    stray = next((key for key, subset in subsets.items() if subset not in ("train", "val")), None)
    if stray is not None:
        raise UserError(f"{images[stray]}: expected images/train/... or images/val/...")
    _no_orphans(masks, images, "images")
    return [RawSample(key, subsets[key], uri, _mask(masks, key, subsets[key], "masks")) for key, uri in images.items()]


def _mask(masks: dict[str, str], key: str, subset: str, folder: str) -> str | None:
    return masks.get(key) if subset == "train" else required(masks, key, folder)


def _no_orphans(masks: dict[str, str], images: dict[str, str], folder: str) -> None:
    orphan = next((uri for key, uri in masks.items() if key not in images), None)
    if orphan is not None:
        raise UserError(f"{orphan}: a mask without an image of the same name in {folder}")
