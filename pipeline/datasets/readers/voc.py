"""The layout of PASCAL VOC, with or without the masks of SBD."""

from pathlib import PurePosixPath

from pipeline import storage
from pipeline.datasets.readers.tree import RawSample, by_name, required
from pipeline.datasets.splits import read_entries
from pipeline.errors import UserError


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
