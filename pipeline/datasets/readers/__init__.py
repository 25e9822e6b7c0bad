"""Reads raw trees: which images there are, which subset each belongs to, and where its mask is.

Each root is a path or URI. Nothing is opened here but lists of names. The layouts:

- `voc`: JPEGImages/ID.jpg, SegmentationClass/ID.png, ImageSets/Segmentation/{train,val}.txt. Images that no
  list names and that have no mask join train as unlabeled. If SegmentationClassAug and trainaug.txt are
  there, they win. With a tree of SBD beside it, train is the augmented set.
- `cityscapes`: leftImg8bit/SUBSET/CITY/ID_leftImg8bit.png, gtFine/SUBSET/CITY/ID_gtFine_labelTrainIds.png, or
  ..._labelIds.png. Subset `train_extra` joins train as unlabeled; `test` is left out.
- `camvid`: train/ID.png, trainannot/ID.png, val/ID.png, valannot/ID.png, as SegNet's copy of CamVid; `test` is
  left out.
- `ade20k`: images/{training,validation}/ID.jpg, annotations/{training,validation}/ID.png.
- `folder`: images/{train,val}/ANY/NAME.jpg and masks/{train,val}/ANY/NAME.png, with equal names for image and
  mask. The id is `train/ANY/NAME`.

In the last three an image in train without a mask is unlabeled; one in val needs its mask.
"""

from collections.abc import Callable, Mapping

from pipeline import storage
from pipeline.datasets.readers.cityscapes import read_cityscapes
from pipeline.datasets.readers.pairs import read_ade20k, read_camvid, read_folder
from pipeline.datasets.readers.tree import RawSample
from pipeline.datasets.readers.voc import read_voc
from pipeline.errors import UserError

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
