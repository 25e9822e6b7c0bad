"""The command line of `u2pl prepare`, and the samples and classes of the raw tree that its flags name."""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

from pipeline import storage
from pipeline.config import cli
from pipeline.datasets.pools.sources import POOL_SOURCES
from pipeline.datasets.raw.layouts import LAYOUTS, RawSample, read_tree
from pipeline.datasets.shapes import LOOKS
from pipeline.datasets.specs import KNOWN, DatasetSpec, find_spec, with_values
from pipeline.errors import UserError

SOURCES = (*LOOKS, *LAYOUTS, *POOL_SOURCES)
POOL_FLAGS = ("copy", "append", "overwrite", "skip_bad", "column", "workers")
"""Those that `make_pool` takes."""
VOC_FLAGS = ("masks", "train_list", "val_list", "sbd")
"""Those that belong to trees of VOC; `read_voc` has arguments of these names."""


_OTHER_IDS = {
    "ade20k": "0 is no class there: --values 0=255,1=0,2=1,...",
    "camvid": "11 is no class there: --values 0=0,1=1,...,11=255",
}
"""What masks of a layout hold where the classes are not the layout's own."""


def parse(argv: Sequence[str], description: str | None) -> argparse.Namespace:
    """Reads the flags.

    Raises:
        UserError: a flag is unknown or lacks the one it goes with.
    """
    args = _parser(description).parse(argv)
    if not args.check and not args.out:
        raise UserError("--source needs --out, the dataset to write")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    if bool(args.splits) != bool(args.protocol):
        raise UserError("--splits and --protocol go together: a folder of lists, and which of them")
    if args.download and args.source != "voc":
        raise UserError("--download fetches VOC 2012, and SBD if --sbd names a folder; get other sets by hand")
    if args.source in POOL_SOURCES and not args.root:
        raise UserError(f"--source {args.source} needs --root, the folder of the images")
    if args.source not in POOL_SOURCES and (args.copy or args.append):
        raise UserError(f"--copy and --append are for pools: --source {', '.join(POOL_SOURCES)}")
    if bool(args.bands) != bool(args.range):
        raise UserError("--bands and --range go together: --bands 0..11 --range 0..10000")
    if args.bands and args.source in (*LOOKS, *POOL_SOURCES):
        raise UserError("--bands goes with trees of images and masks; a pool is the train part of such a dataset")
    if args.column and args.source != "parquet":
        raise UserError("--column names the images of Parquet files: --source parquet")
    return args


def _parser(description: str | None) -> cli.Parser:
    parser = cli.Parser(description=description)
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--source", choices=SOURCES, help="layout of the raw tree; images, tar and parquet make pools")
    job.add_argument("--check", metavar="URI", help="report on a prepared dataset instead: text here and a page")
    add = parser.add_argument
    add("--page", default="check.html", help="HTML page that --check writes (default: check.html)")
    add("--root", help="raw tree: path or URI")
    add("--out", help="dataset to write: path or URI")
    add("--classes", help="known dataset, names a,b,c, or a file with one a line (default: as the source)")
    add("--values", help="what masks hold: 0=255,7=0,... or #ff8000=1,... (value=class id), or a file, one a line")
    add("--name", help="what to call the dataset (default: the source)")
    add("--splits", metavar="DIR", help="published split lists to take over")
    add("--protocol", help="which of them: classic, blender, cityscapes, or a name of your own")
    add("--masks", help="folder of the masks in a voc tree, such as SegmentationClassAug")
    add("--train_list", help="list of a voc tree with the training images (default: trainaug or train)")
    add("--val_list", help="list of a voc tree with the images to score (default: val)")
    add("--sbd", metavar="DIR", help="tree of SBD whose masks join those of a voc tree: the augmented set")
    add("--download", action="store_true", help="fetch VOC 2012 to --root, and SBD to --sbd, first")
    add("--exif", choices=("auto", "apply", "ignore"), default="auto",
        help="rotations that cameras note: turn the pixels, or leave them (default: as the mask fits)")  # fmt: skip
    add("--bands", help="bands of TIFF or PNG files that are no 8-bit RGB, from 0: 0..11 or 3,2,1 (with --range)")
    add("--range", metavar="LOW..HIGH", help="values of the bands that become 0 and 255: for all, or a,b,c for each")
    add("--high_byte", action="store_true", help="keep the upper eight bits of images with 16 bits a channel")
    add("--seed", type=int, default=0, help="of row order, generated splits and images (default: 0)")
    add("--overwrite", action="store_true", help="replace what is finished")
    add("--skip_bad", action="store_true", help="leave bad samples out instead of stopping")
    add("--copy", action="store_true", help="keep the images in a pool; else it holds links to them")
    add("--append", action="store_true", help="add images to a pool that it does not have yet")
    add("--column", default="", help="column of the images in Parquet files (default: image, or the one of bytes)")
    add("--workers", type=int, help="shards made at a time (default: one per CPU)")
    return parser


def read_raw(args: argparse.Namespace) -> tuple[list[RawSample], DatasetSpec, Counter[str]]:
    """The samples and classes of the raw tree that the flags name, downloaded before if they say so.

    Returns:
        Samples, classes, and the pictures that were passed over, by suffix.

    Raises:
        UserError: what `read_tree`, `find_spec`, `with_values` and the downloads raise.
    """
    if not args.classes and args.source not in KNOWN:
        raise UserError(f"--source {args.source} needs --classes: names a,b,c, a file, or a known dataset")
    spec = find_spec(args.classes or args.source)
    if args.source in _OTHER_IDS and not spec.label_ids and not args.values:
        raise UserError(f"--classes {args.classes}: say what the masks hold, as {_OTHER_IDS[args.source]}")
    if args.values:
        spec = with_values(spec, args.values)
    options = {key: vars(args)[key] for key in VOC_FLAGS if vars(args)[key]}
    root = args.root
    if args.download and root:
        root = download_voc(root)
        options |= {"sbd": download_sbd(args.sbd)} if args.sbd else {}
    samples, passed = read_tree(args.source, root, options)
    return [replace(each, label_ids=True) for each in samples] if args.values else samples, spec, passed


def download_voc(folder: str) -> str:
    """Fetches PASCAL VOC 2012 (2 GB) into the local `folder`, unless that is done.

    Returns:
        The folder that holds JPEGImages.

    Raises:
        UserError: `folder` is not on a disk, the server does not give the file, or it is damaged.
    """
    from torchvision.datasets import VOCSegmentation

    _once(folder, "VOC2012", lambda root: VOCSegmentation(root, "2012", "train", download=True))
    return storage.join(folder, "VOCdevkit", "VOC2012")


def download_sbd(folder: str) -> str:
    """Fetches SBD (1.4 GB) into the local `folder`, unless that is done.

    Returns:
        The folder that holds cls.

    Raises:
        UserError: as `download_voc`, a tree is there already, or scipy is not installed.
    """
    from torchvision.datasets import SBDataset

    def fetch(root: str) -> None:
        if (Path(root) / "cls").exists():  # torchvision would fetch it all and then refuse
            raise UserError(f"{root}/cls: is there already; use it without --download, or remove {root} first")
        SBDataset(root, "train", "segmentation", download=True)

    _once(folder, "SBD", fetch)
    return folder


def _once(folder: str, name: str, fetch: Callable[[str], object]) -> None:
    """Calls `fetch` and leaves a mark when it is done. An archive that came whole is not fetched again."""
    if not storage.is_local(folder):
        raise UserError(f"{folder}: --download unpacks to a disk; name a local folder that all nodes share")
    root = Path(storage.absolute(folder))
    mark = root / f".{name}.complete"
    if mark.exists():
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        fetch(str(root))
        mark.touch()
    except (OSError, RuntimeError, HTTPException) as error:  # what urllib, tarfile and torchvision raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} could not be downloaded to {root} ({text}); try again, or fetch it by hand") from error
