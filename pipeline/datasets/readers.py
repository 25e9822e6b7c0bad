"""Reads raw trees: which images there are, which subset each belongs to, and where its mask is.

Three layouts are known; each root is a path or URI. Nothing is opened here, only listed.

- `voc`: JPEGImages/ID.jpg, SegmentationClass/ID.png, ImageSets/Segmentation/{train,val}.txt. Images that no
  list names and that have no mask join train as unlabeled. If SegmentationClassAug and trainaug.txt are
  there, they win.
- `cityscapes`: leftImg8bit/SUBSET/CITY/ID_leftImg8bit.png, gtFine/SUBSET/CITY/ID_gtFine_labelTrainIds.png, or
  ..._labelIds.png. Subset `train_extra` joins train as unlabeled; `test` is left out.
- `folder`: images/{train,val}/ANY/NAME.jpg and masks/{train,val}/ANY/NAME.png, with equal names for image and
  mask. The id is `train/ANY/NAME`. An image in train without a mask is unlabeled; one in val needs its mask.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.datasets.splits import read_entries
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
    """Whether the mask holds the dataset's raw label ids instead of class ids."""


def read_voc(
    root: str, masks: str | None = None, train_list: str | None = None, val_list: str | None = None
) -> list[RawSample]:
    """Reads a tree of the `voc` layout.

    Args:
        root: the folder that holds JPEGImages.
        masks: name of the folder with the masks; None: SegmentationClassAug together with the list trainaug
            if both are there, else SegmentationClass.
        train_list: name of a list in ImageSets/Segmentation, or a path or URI of one; None: train or
            trainaug.
        val_list: the same for the images to score; None: val.

    Raises:
        UserError: a folder or list is missing, or a list names an image or a val mask that is not there.
    """
    images = _by_name(storage.join(root, "JPEGImages"))
    lists = storage.join(root, "ImageSets", "Segmentation")
    if masks is None:
        augmented = _by_name(storage.join(root, "SegmentationClassAug"), required=False)
        both = bool(augmented) and storage.exists(storage.join(lists, "trainaug.txt"))
        masks, default = ("SegmentationClassAug", "trainaug") if both else ("SegmentationClass", "train")
    else:
        default = "trainaug" if masks == "SegmentationClassAug" else "train"
    found = _by_name(storage.join(root, masks))
    train = _listed(lists, train_list or default, images)
    val = _listed(lists, val_list or "val", images)
    test = storage.join(lists, "test.txt")
    named = {*train, *val, *(read_entries(test) if storage.exists(test) else ())}
    bare = [key for key in images if key not in named and key not in found]
    return [
        *(RawSample(key, "train", images[key], found.get(key)) for key in train),
        *(RawSample(key, "train", images[key], None) for key in bare),
        *(RawSample(key, "val", images[key], _required(found, key, masks)) for key in val),
    ]


def _listed(lists: str, name: str, images: dict[str, str]) -> list[str]:
    """The ids of a list of the tree, or of any other file; entries may be paths."""
    uri = name if "/" in name or name.endswith(".txt") else storage.join(lists, f"{name}.txt")
    ids = [PurePosixPath(entry.split()[0]).stem for entry in read_entries(uri)]
    missing = next((key for key in ids if key not in images), None)
    if missing is not None:
        raise UserError(f"{uri}: names {missing}, but JPEGImages has no such file")
    return ids


def read_cityscapes(root: str) -> list[RawSample]:
    """Reads a tree of the `cityscapes` layout.

    Args:
        root: the folder that holds leftImg8bit and gtFine.

    Raises:
        UserError: no images, or a val image without a mask.
    """
    tail = "_leftImg8bit"
    images = {
        key.removesuffix(tail): uri
        for key, uri in _by_path(storage.join(root, "leftImg8bit")).items()
        if key.endswith(tail)
    }
    masks = _by_path(storage.join(root, "gtFine"), required=False)
    samples = []
    for key, uri in images.items():
        subset = {"train": "train", "train_extra": "train", "val": "val"}.get(key.partition("/")[0])
        if subset is None:
            continue
        mask = masks.get(f"{key}_gtFine_labelTrainIds")
        raw = None if mask else masks.get(f"{key}_gtFine_labelIds")
        if subset == "val" and not (mask or raw):
            raise UserError(f"{uri}: a validation image without a mask in gtFine")
        samples.append(RawSample(PurePosixPath(key).name, subset, uri, mask or raw, label_ids=raw is not None))
    return samples


def read_folder(root: str) -> list[RawSample]:
    """Reads a tree of the `folder` layout.

    Args:
        root: the folder that holds images and perhaps masks.

    Raises:
        UserError: no images, a val image without a mask, or a mask without an image.
    """
    images = _by_path(storage.join(root, "images"))
    masks = _by_path(storage.join(root, "masks"), required=False)
    stray = next((key for key in images if key.partition("/")[0] not in ("train", "val")), None)
    if stray is not None:
        raise UserError(f"{images[stray]}: expected images/train/... or images/val/...")
    orphan = next((uri for key, uri in masks.items() if key not in images), None)
    if orphan is not None:
        raise UserError(f"{orphan}: a mask without an image of the same name in images")
    return [
        RawSample(key, "train", uri, masks.get(key))
        if key.startswith("train/")
        else RawSample(key, "val", uri, _required(masks, key, "masks"))
        for key, uri in images.items()
    ]


def read_tree(source: str, root: str | None, options: Mapping[str, str]) -> list[RawSample]:
    """Reads a tree of the layout `source`: voc, cityscapes or folder.

    Args:
        source: which layout.
        root: path or URI; the samples' URIs are valid in every working directory.
        options: arguments of `read_voc`; the other layouts have none.

    Raises:
        UserError: no root, options for a layout without them, or what the reader raises.
    """
    if not root:
        raise UserError(f"--source {source} needs --root, the folder of the raw images")
    root = storage.absolute(root)
    if source == "voc":
        return read_voc(root, **options)
    if options:
        raise UserError(f"--{next(iter(options))} belongs to --source voc; {source} trees have no such choice")
    return {"cityscapes": read_cityscapes, "folder": read_folder}[source](root)


def _required(masks: dict[str, str], key: str, folder: str) -> str:
    if key not in masks:
        raise UserError(f"{key}: a validation image without a mask in {folder}")
    return masks[key]


def _by_path(folder: str, required: bool = True) -> dict[str, str]:
    """URI of each image file below `folder`, by its path there without the suffix, sorted."""
    return _keyed(folder, (file for file in storage.list_files(folder)), required)


def _by_name(folder: str, required: bool = True) -> dict[str, str]:
    """URI of each image file directly in `folder`, by its name without the suffix, sorted."""
    return _keyed(folder, (file for file in storage.list_files(folder) if "/" not in file), required)


def _keyed(folder: str, files: Iterable[str], required: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in files:
        path = PurePosixPath(file)
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        key = str(path.with_suffix(""))
        uri = storage.join(folder, file)
        if key in found:
            raise UserError(f"{uri}: duplicate id {key}, also {found[key]}; rename one of them")
        found[key] = uri
    if required and not found:
        raise UserError(f"{folder}: no JPEG or PNG files there; check --root and --source")
    return found
