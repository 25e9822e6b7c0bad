"""The layout of Cityscapes: images and masks by subset and city."""

from pathlib import PurePosixPath

from pipeline import storage
from pipeline.datasets.readers.tree import RawSample, by_path
from pipeline.errors import UserError

_SUBSETS = {"train": "train", "train_extra": "train", "val": "val"}
_TAIL = "_leftImg8bit"


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
