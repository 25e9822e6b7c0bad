"""Raw trees: one reader a folder layout, which lists images and masks by path and opens no image.

A new layout is a function here and a line in `LAYOUTS`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.datasets.prepared.splits import read_entries
from pipeline.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


# ---- what all layouts share -------------------------------------------------------------------------------------


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
    """Whether the mask holds the dataset's raw label ids (see `DatasetSpec.label_ids`) instead of class ids."""


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


_SUBSETS = {"train": "train", "train_extra": "train", "val": "val"}
_TAIL = "_leftImg8bit"


# ---- layouts ----------------------------------------------------------------------------------------------------


def read_cityscapes(root: str) -> list[RawSample]:
    """Reads a tree of the `cityscapes` layout.

    Args:
        root: the folder that holds leftImg8bit and gtFine.

    Raises:
        UserError: no images, or a val image without a mask.
    """
    found = by_path(storage.join(root, "leftImg8bit"))
    images = {key.removesuffix(_TAIL): uri for key, uri in found.items() if key.endswith(_TAIL)}
    masks = by_path(storage.join(root, "gtFine"), required=False)
    samples = []
    for key, uri in images.items():
        subset = _SUBSETS.get(key.partition("/")[0])
        if subset is None:
            continue
        mask = masks.get(f"{key}_gtFine_labelTrainIds")
        raw = None if mask else masks.get(f"{key}_gtFine_labelIds")
        if subset == "val" and not (mask or raw):
            raise UserError(f"{uri}: a validation image without a mask in gtFine")
        samples.append(RawSample(PurePosixPath(key).name, subset, uri, mask or raw, label_ids=raw is not None))
    return samples


def read_camvid(root: str) -> list[RawSample]:
    """Reads a tree of the `camvid` layout; void is 11 there, see `DatasetSpec.label_ids`.

    Args:
        root: the folder that holds train, trainannot, val and valannot.

    Raises:
        UserError: no images, a val image without a mask, or a mask without an image.
    """
    subsets = ("train", "val")
    return [each for name in subsets for each in _pairs(root, name, name, f"{name}annot", label_ids=True)]


def read_ade20k(root: str) -> list[RawSample]:
    """Reads a tree of the `ade20k` layout; 0 is no class there, see `DatasetSpec.label_ids`.

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


def read_voc(
    root: str,
    masks: str | None = None,
    train_list: str | None = None,
    val_list: str | None = None,
    sbd: str | None = None,
) -> list[RawSample]:
    """Reads a tree of the `voc` layout.

    With `sbd`, train is the augmented set: the train list and all images of SBD, without those of the val
    list (of VOC 2012: 10,582). A mask of the VOC tree wins over SBD's, which knows no ignored borders.

    Args:
        root: the folder that holds JPEGImages.
        masks: name of the folder with the masks; None: SegmentationClassAug together with the list trainaug
            if both are there and `sbd` is not given, else SegmentationClass.
        train_list: name of a list in ImageSets/Segmentation, or a path or URI of one; None: train or
            trainaug.
        val_list: the same for the images to score; None: val.
        sbd: the folder of SBD that holds cls, img, train.txt and val.txt, or a benchmark_RELEASE/dataset.

    Raises:
        UserError: a folder or list is missing, or a list names an image or a val mask that is not there.
    """
    images = by_name(storage.join(root, "JPEGImages"))
    lists = storage.join(root, "ImageSets", "Segmentation")
    masks = masks or _default_masks(root, lists, sbd)
    found = by_name(storage.join(root, masks))
    train = _listed(lists, train_list or ("trainaug" if masks == "SegmentationClassAug" else "train"), images)
    val = _listed(lists, val_list or "val", images)
    if sbd:
        extra_images, extra_masks = _read_sbd(sbd)
        images, found = {**extra_images, **images}, {**extra_masks, **found}
        train = [*train, *sorted({*extra_masks} - {*train, *val})]
    test = storage.join(lists, "test.txt")
    named = {*train, *val, *(read_entries(test) if storage.exists(test) else ())}
    bare = [key for key in images if key not in named and key not in found]
    return [
        *(RawSample(key, "train", images[key], found.get(key)) for key in train),
        *(RawSample(key, "train", images[key], None) for key in bare),
        *(RawSample(key, "val", images[key], required(found, key, masks)) for key in val),
    ]


def _default_masks(root: str, lists: str, sbd: str | None) -> str:
    if sbd or not storage.exists(storage.join(lists, "trainaug.txt")):
        return "SegmentationClass"
    augmented = by_name(storage.join(root, "SegmentationClassAug"), required=False)
    return "SegmentationClassAug" if augmented else "SegmentationClass"


def _listed(lists: str, name: str, images: dict[str, str]) -> list[str]:
    """The ids of a list of the tree, or of any other file; entries may be paths."""
    uri = name if "/" in name or name.endswith(".txt") else storage.join(lists, f"{name}.txt")
    ids = [PurePosixPath(entry.split()[0]).stem for entry in read_entries(uri)]
    _all_there(uri, ids, images, "JPEGImages")
    return ids


def _read_sbd(root: str) -> tuple[dict[str, str], dict[str, str]]:
    """Images and `.mat` masks by id, of the ids that SBD's two lists name."""
    release = storage.join(root, "benchmark_RELEASE", "dataset")
    root = storage.absolute(release if storage.exists(storage.join(release, "train.txt")) else root)
    images = by_name(storage.join(root, "img"))
    masks = by_name(storage.join(root, "cls"), suffixes=(".mat",))
    listed: set[str] = set()
    for name in ("train.txt", "val.txt"):
        uri = storage.join(root, name)
        ids = read_entries(uri)
        _all_there(uri, ids, images, "img")
        _all_there(uri, ids, masks, "cls")
        listed |= {*ids}
    return {key: images[key] for key in listed}, {key: masks[key] for key in listed}


def _all_there(uri: str, ids: list[str], files: dict[str, str], folder: str) -> None:
    missing = next((key for key in ids if key not in files), None)
    if missing is not None:
        raise UserError(f"{uri}: names {missing}, but {folder} has no such file")


__all__ = [
    "LAYOUTS",
    "RawSample",
    "read_ade20k",
    "read_camvid",
    "read_cityscapes",
    "read_folder",
    "read_tree",
    "read_voc",
]
# ---- any of them ------------------------------------------------------------------------------------------------


LAYOUTS: dict[str, Callable[..., list[RawSample]]] = {
    "voc": read_voc,
    "cityscapes": read_cityscapes,
    "camvid": read_camvid,
    "ade20k": read_ade20k,
    "folder": read_folder,
}
"""The reader of each layout."""


def read_tree(source: str, root: str | None, options: Mapping[str, str]) -> list[RawSample]:
    """Reads a tree of the layout `source`.

    Args:
        source: one out of `LAYOUTS`.
        root: path or URI; the samples' URIs are valid in every working directory.
        options: arguments of `read_voc`; the other layouts have none.

    Raises:
        UserError: no root, options for a layout without them, or what the reader raises.
    """
    if not root:
        raise UserError(f"--source {source} needs --root, the folder of the raw images")
    if options and source != "voc":
        raise UserError(f"--{next(iter(options))} belongs to --source voc; {source} trees have no such choice")
    return LAYOUTS[source](storage.absolute(root), **options)
