"""Raw trees: one reader a folder layout, which lists images and masks by path and opens no image.

A new layout is a function here and a line in `LAYOUTS`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline import storage
from pipeline.datasets.files import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    PICTURE_SUFFIXES,
    check_name,
    has_suffix,
    is_junk,
    without_suffix,
)
from pipeline.datasets.prepared.splits import find_id
from pipeline.errors import UserError

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


class Folders:
    """The files of a raw tree, folder by folder; counts the pictures that are passed over."""

    def __init__(self, root: str) -> None:
        """Args: root: of the tree."""
        self.root = root
        self.passed: Counter[str] = Counter()
        """What nobody has a use for: pictures of a kind that is not read, by suffix, and more, by reason."""

    def images(self, folder: str, *, deep: bool = False, required: bool = True) -> dict[str, str]:
        """URI of each image in a folder below the root, by its path there without the suffix, sorted.

        Args:
            folder: path below the root.
            deep: look into the folders below it as well.
            required: whether there must be one.

        Raises:
            UserError: two images of one name, a name that cannot be used, or none although `required`.
        """
        uri = storage.join(self.root, folder)
        found, others, _ = _keyed(uri, IMAGE_SUFFIXES, deep)
        self.passed.update(PurePosixPath(file).suffix.lower() for file in others)
        if required and not found:
            raise UserError(f"{uri}: {_nothing(uri, others)}; check --root and --source")
        return found

    def masks(
        self, folder: str, *, deep: bool = False, required: bool = False, suffixes: tuple[str, ...] = MASK_SUFFIXES
    ) -> dict[str, str]:
        """The same of masks.

        Raises:
            UserError: as `images`, or pictures of a kind that cannot be a mask.
        """
        uri = storage.join(self.root, folder)
        found, others, rest = _keyed(uri, suffixes, deep)
        kinds = (PurePosixPath(file).suffix.lower() for file in rest)
        self.passed.update(f"{kind} beside masks" for kind in kinds if kind in _ARRAYS)
        if others:
            known = ", ".join(suffix.removeprefix(".") for suffix in suffixes)
            raise UserError(
                f"{uri}/{others[0]}: masks are files of kind {known} (JPEG changes class ids); "
                f"{len(others)} files there are not"
            )
        if required and not found:
            raise UserError(f"{uri}: {_nothing(uri, others)}; check --root and --source")
        return found


def _nothing(uri: str, others: Sequence[str]) -> str:
    """What to say of a folder without a file that is wanted."""
    if others:
        return f"none of its files is of a kind that is read, such as {others[0]}"
    if storage.is_local(uri) and not Path(uri).is_dir():
        return "no such folder"
    return "no images there" if storage.list_files(uri) else "nothing there"


_ARRAYS = (".npy", ".npz", ".mat", ".nii", ".gz")
"""What masks are written as, too, and nothing here reads."""


def _keyed(folder: str, suffixes: tuple[str, ...], deep: bool) -> tuple[dict[str, str], list[str], list[str]]:
    """The files of a folder with one of `suffixes`, the other pictures there, and what is none; without junk."""
    found: dict[str, str] = {}
    others: list[str] = []
    rest: list[str] = []
    for file in storage.list_files(folder):
        if is_junk(file) or (not deep and "/" in file):
            continue
        if not has_suffix(file, suffixes):
            (others if has_suffix(file, PICTURE_SUFFIXES) else rest).append(file)
            continue
        check_name(folder, file)
        key, uri = without_suffix(file), storage.join(folder, file)
        if key in found:
            raise UserError(f"{uri}: duplicate id {key}, also {found[key]}; rename one of them")
        found[key] = uri
    return found, others, rest


def _count(tree: Folders, what: str, names: Collection[str]) -> None:
    """Notes what a reader of a tree has no use for, if there is any."""
    if names:
        tree.passed[what] += len(names)


def required(masks: dict[str, str], key: str, folder: str) -> str:
    """The mask of the validation image `key`.

    Raises:
        UserError: it has none.
    """
    if key not in masks:
        raise UserError(f"{key}: a validation image without a mask in {folder}")
    return masks[key]


_SUBSETS = {"train": "train", "train_extra": "train", "val": "val"}
_TAIL = "_leftImg8bit"


# ---- layouts ----------------------------------------------------------------------------------------------------


def read_cityscapes(tree: Folders) -> list[RawSample]:
    """Reads a tree of the `cityscapes` layout.

    Args:
        tree: the folder that holds leftImg8bit and gtFine.

    Raises:
        UserError: no images, or a val image without a mask.
    """
    found = tree.images("leftImg8bit", deep=True)
    images = {key.removesuffix(_TAIL): uri for key, uri in found.items() if key.endswith(_TAIL)}
    masks = tree.masks("gtFine", deep=True)
    samples = []
    of_images = {f"{key}_gtFine_{kind}" for key in images for kind in ("labelTrainIds", "labelIds")}
    ids = {key for key in masks if key.endswith(("_labelTrainIds", "_labelIds"))}
    _count(tree, "masks without an image of their name", ids - of_images)
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


def read_camvid(tree: Folders) -> list[RawSample]:
    """Reads a tree of the `camvid` layout; void is 11 there, see `DatasetSpec.label_ids`.

    Args:
        tree: the folder that holds train, trainannot, val and valannot.

    Raises:
        UserError: no images, a val image without a mask, or a mask without an image.
    """
    subsets = ("train", "val")
    return [each for name in subsets for each in _pairs(tree, name, name, f"{name}annot", label_ids=True)]


def read_ade20k(tree: Folders) -> list[RawSample]:
    """Reads a tree of the `ade20k` layout; 0 is no class there, see `DatasetSpec.label_ids`.

    Args:
        tree: the folder that holds images and annotations.

    Raises:
        UserError: no images, a val image without a mask, or a mask without an image.
    """
    subsets = {"train": "training", "val": "validation"}
    return [
        each
        for subset, name in subsets.items()
        for each in _pairs(tree, subset, f"images/{name}", f"annotations/{name}", label_ids=True)
    ]


def _pairs(tree: Folders, subset: str, images: str, masks: str, label_ids: bool) -> list[RawSample]:
    found = tree.images(images)
    known = tree.masks(masks)
    _no_orphans(known, found, images)
    return [RawSample(key, subset, uri, _mask(known, key, subset, masks), label_ids) for key, uri in found.items()]


def read_folder(tree: Folders) -> list[RawSample]:
    """Reads a tree of the `folder` layout.

    Args:
        tree: the folder that holds images and perhaps masks.

    Raises:
        UserError: no images, a val image without a mask, or a mask without an image.
    """
    images = tree.images("images", deep=True)
    masks = tree.masks("masks", deep=True)
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
    tree: Folders,
    masks: str | None = None,
    train_list: str | None = None,
    val_list: str | None = None,
    sbd: str | None = None,
) -> list[RawSample]:
    """Reads a tree of the `voc` layout.

    With `sbd`, train is the augmented set: the train list and all images of SBD, without those of the val
    list (of VOC 2012: 10,582). A mask of the VOC tree wins over SBD's, which knows no ignored borders.

    Args:
        tree: the folder that holds JPEGImages.
        masks: name of the folder with the masks; None: SegmentationClassAug together with the list trainaug
            if both are there and `sbd` is not given, else SegmentationClass.
        train_list: name of a list in ImageSets/Segmentation, or a path or URI of one; None: train or
            trainaug.
        val_list: the same for the images to score; None: val.
        sbd: the folder of SBD that holds cls, img, train.txt and val.txt, or a benchmark_RELEASE/dataset.

    Raises:
        UserError: a folder or list is missing, or a list names an image or a val mask that is not there.
    """
    images = tree.images("JPEGImages")
    lists = storage.join(tree.root, "ImageSets", "Segmentation")
    masks = masks or _default_masks(tree, lists, sbd)
    found = tree.masks(masks, required=True)
    default = "trainaug" if masks == "SegmentationClassAug" else "train"
    train = _listed(lists, train_list or default, images, "--train_list")
    val = _listed(lists, val_list or "val", images, "--val_list")
    if sbd:
        extra_images, extra_masks = _read_sbd(sbd)
        images, found = {**extra_images, **images}, {**extra_masks, **found}
        train = [*train, *sorted({*extra_masks} - {*train, *val})]
    test = storage.join(lists, "test.txt")
    tested = [find_id(entry, images) or "" for entry in (storage.read_lines(test) if storage.exists(test) else ())]
    named = {*train, *val, *tested}
    bare = [key for key in images if key not in named and key not in found]
    _count(tree, "masks without an image of their name", found.keys() - images.keys())
    _count(tree, "images with a mask that no list names", (images.keys() & found.keys()) - named)
    return [
        *(RawSample(key, "train", images[key], found.get(key)) for key in train),
        *(RawSample(key, "train", images[key], None) for key in bare),
        *(RawSample(key, "val", images[key], required(found, key, masks)) for key in val),
    ]


def _default_masks(tree: Folders, lists: str, sbd: str | None) -> str:
    if sbd or not storage.exists(storage.join(lists, "trainaug.txt")):
        return "SegmentationClass"
    return "SegmentationClassAug" if tree.masks("SegmentationClassAug") else "SegmentationClass"


def _listed(lists: str, name: str, images: dict[str, str], flag: str) -> list[str]:
    """The ids of a list of the tree, or of any other file; entries may be paths.

    Args:
        lists: folder of the tree's own lists.
        name: one of these, or a path or URI.
        images: what there is, by id.
        flag: that names another list.

    Raises:
        UserError: no such list, or an entry that names no image, or one that an earlier line names.
    """
    uri = name if "/" in name or name.endswith(".txt") else storage.join(lists, f"{name}.txt")
    if not storage.exists(uri):
        there = [file.removesuffix(".txt") for file in storage.list_files(lists) if file.endswith(".txt")]
        hint = f"; {flag} takes one of those that are there: {', '.join(there)}" if there else ""
        raise UserError(f"{uri}: no such list{hint}")
    ids: dict[str, int] = {}
    for number, entry in enumerate(storage.read_lines(uri), start=1):
        key = find_id(entry, images)
        if key is None:
            raise UserError(f"{uri}: names {entry}, but JPEGImages has no such file")
        if key in ids:
            raise UserError(f"{uri}: {key} is listed twice, as entries {ids[key]} and {number}; remove one of them")
        ids[key] = number
    return list(ids)


def _read_sbd(root: str) -> tuple[dict[str, str], dict[str, str]]:
    """Images and `.mat` masks by id, of the ids that SBD's two lists name."""
    release = storage.join(root, "benchmark_RELEASE", "dataset")
    tree = Folders(storage.absolute(release if storage.exists(storage.join(release, "train.txt")) else root))
    images = tree.images("img")
    masks = tree.masks("cls", required=True, suffixes=(".mat",))
    listed: set[str] = set()
    for name in ("train.txt", "val.txt"):
        uri = storage.join(tree.root, name)
        ids = storage.read_lines(uri)
        _all_there(uri, ids, images, "img")
        _all_there(uri, ids, masks, "cls")
        listed |= {*ids}
    return {key: images[key] for key in listed}, {key: masks[key] for key in listed}


def _all_there(uri: str, ids: list[str], files: dict[str, str], folder: str) -> None:
    missing = next((key for key in ids if key not in files), None)
    if missing is not None:
        raise UserError(f"{uri}: names {missing}, but {folder} has no such file")


# ---- any of them ------------------------------------------------------------------------------------------------


LAYOUTS: dict[str, Callable[..., list[RawSample]]] = {
    "voc": read_voc,
    "cityscapes": read_cityscapes,
    "camvid": read_camvid,
    "ade20k": read_ade20k,
    "folder": read_folder,
}
"""The reader of each layout."""


def read_tree(source: str, root: str | None, options: Mapping[str, str]) -> tuple[list[RawSample], Counter[str]]:
    """Reads a tree of the layout `source`.

    Args:
        source: one out of `LAYOUTS`.
        root: path or URI; the samples' URIs are valid in every working directory.
        options: arguments of `read_voc`; the other layouts have none.

    Returns:
        The samples; and how many files were passed over, see `Folders.passed`.

    Raises:
        UserError: no root, options for a layout without them, or what the reader raises.
    """
    if not root:
        raise UserError(f"--source {source} needs --root, the folder of the raw images")
    if options and source != "voc":
        raise UserError(f"--{next(iter(options))} belongs to --source voc; {source} trees have no such choice")
    tree = Folders(storage.absolute(root))
    return LAYOUTS[source](tree, **options), tree.passed
