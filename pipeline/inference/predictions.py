"""Masks of any number of images, made by a trained network on Ray: each task makes those of one unit.

What is written is a folder on any storage:

    predictions.json           what the masks are made by and of (`PredictionsInfo`); the first file
    masks/NAME.png             the most likely class of each pixel, in the run's palette
    overlays/NAME.jpg          the photo under its mask, if asked for
    entropy/NAME.png           8-bit grey, 255 is log C, if asked for
    probabilities/NAME.npz     float16 [C,H,W], if asked for
    units/0000000.json, ...    a `UnitRecord` each, the last file of its unit: what has one is done
    units/names.txt            the names of all images, by which `--overwrite` knows what is its own
    left_out.txt               images that could not be read, and why, if there are any

A VOC tree has its masks in SegmentationClass instead, the photos in JPEGImages, train.txt and labelmap.txt.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np

from pipeline import checkpoint, storage
from pipeline.cluster import tasks
from pipeline.datasets.files import escaped, is_junk
from pipeline.datasets.images import decode_mask
from pipeline.datasets.pools.place import files_below
from pipeline.errors import UserError
from pipeline.inference.evaluate import ahead
from pipeline.inference.load import bands_of, describe, load_model, read_pixels, task_device
from pipeline.inference.mask_writer import (
    ENTROPY,
    OVERLAYS,
    PROBABILITIES,
    SUFFIXES,
    VOC,
    MaskWriter,
    Recipe,
    UnitRecord,
    record_file,
)
from pipeline.inference.units import Listing, Unit, list_images, read_images
from pipeline.patience import Patience, retried
from pipeline.records import read_record

INFO_FILE = "predictions.json"
NAMES_FILE = "units/names.txt"
LEFT_OUT_FILE = "left_out.txt"
DELETES = 16
"""Files that are deleted at a time."""
_OWN = {
    "masks": (".png",), "SegmentationClass": (".png",), "JPEGImages": tuple(SUFFIXES.values()), OVERLAYS: (".jpg",),
    ENTROPY: (".png",), PROBABILITIES: (".npz",),
}  # fmt: skip
"""What stands behind an image's name, by folder."""
_VOC_LIST, _LABELMAP = "ImageSets/Segmentation/train.txt", "labelmap.txt"
_FIXED = re.compile(
    r"units/(\d{7,}\.json|names\.txt)|predictions\.json|left_out\.txt|ranking\.(csv|html)|labelmap\.txt|"
    r"ImageSets/Segmentation/train\.txt"
)
_HALF = re.compile(r"\.[0-9a-f]{8}\.tmp$")
"""What a killed write leaves on a disk ends so."""


@dataclass(frozen=True, kw_only=True)
class PredictionsInfo:
    """The content of predictions.json."""

    checkpoint: str
    """Folder of the network."""
    network: str
    """Its SHA-256."""
    images: str
    """Where the images are."""
    listing: str
    """Hash of their names and contents, and of how they are cut into units."""
    options: tuple[str, ...]
    """`OVERLAYS` and the others."""
    finished: bool = False
    """Whether all units are done."""

    def differs(self, other: "PredictionsInfo") -> str:
        """What keeps one from going on with the other's units, for people; empty: nothing."""
        if self.network != other.network:
            return f"by another network ({self.checkpoint})"
        if self.options != other.options:
            return f"with other options ({', '.join(self.options) or 'none'})"
        return f"of another list of images ({self.images})" if self.listing != other.listing else ""


@dataclass(frozen=True)
class Job:
    """What one command asks for."""

    out: str
    """Where to write, valid in every working directory."""
    info: PredictionsInfo
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    listing: Listing

    @property
    def recipe(self) -> "Recipe":
        """What each task has to know."""
        return Recipe(self.out, self.info.checkpoint, self.info.options)


@dataclass(frozen=True)
class Outcome:
    """What came of a job."""

    masks: int
    left_out: int
    turned: int
    """Of the masks, those whose photo notes a rotation."""


# ---- the job ------------------------------------------------------------------------------------------------------


def plan(run: str, images: str, out: str, options: tuple[str, ...], subset: str | None = None) -> Job:
    """Looks at run and images; writes nothing, and opens no image.

    Args:
        run: run directory, whose newest checkpoint is taken, or checkpoint folder.
        images: folder of files, pool or dataset.
        out: where to write.
        options: `OVERLAYS` and the others.
        subset: of a dataset, see `list_images`.

    Raises:
        UserError: there is no such checkpoint or it is damaged, there are no images, or two would get one name.
    """
    place = checkpoint.find(storage.absolute(run))
    model = load_model(place)
    listing = list_images(images, subset, flat=VOC in options)
    out = storage.absolute(out)
    if f"{out}/".startswith(f"{listing.root}/"):
        raise UserError(f"{out}: lies inside --images {listing.root}; choose a place outside of it")
    info = PredictionsInfo(
        checkpoint=place, network=checkpoint.read_meta(place).sha256, images=listing.root, listing=listing.digest,
        options=tuple(sorted(options)),
    )  # fmt: skip
    return Job(out, info, model.classes, model.palette, listing)


def check_place(job: Job, *, overwrite: bool) -> PredictionsInfo | None:
    """What an earlier command has begun at `job.out`, if there is anything; writes nothing.

    Raises:
        UserError: files of others are there, or other predictions, and they are not to be overwritten.
    """
    uri = storage.join(job.out, INFO_FILE)
    if not storage.exists(uri):
        for file in files_below(job.out):
            if not is_junk(file) and file.partition("/")[0] != "lease" and _HALF.sub("", file) != INFO_FILE:
                raise UserError(
                    f"{job.out}: holds files that predict did not write, such as {escaped(file)}; choose an empty --out"
                )
        return None
    try:
        there = read_record(PredictionsInfo, storage.read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri}: not readable ({error}); choose another --out") from error
    if not overwrite and (what := there.differs(job.info)):
        raise UserError(f"{job.out}: holds masks made {what}; --overwrite replaces them, or choose another --out")
    return there


def carry_out(job: Job, *, overwrite: bool = False) -> Outcome:
    """Makes what is missing. Interrupted, the same call goes on with the units that are not done.

    Args:
        job: from `plan`.
        overwrite: delete what another job or this one, finished, has written; nothing else is deleted.

    Raises:
        UserError: as `check_place`, no image could be read, or the storage refuses.
    """
    there = check_place(job, overwrite=overwrite)
    if there and overwrite and (there.finished or there.differs(job.info)):
        clear(job.out)
        there = None
    if there is None:
        _write(job.out, INFO_FILE, _json(job.info))
    names = [name for unit in job.listing.units for name in unit.names if name]
    _write(job.out, NAMES_FILE, "".join(f"{name}\n" for name in names))
    done = set(files_below(storage.join(job.out, "units")))
    todo = [(job.recipe, unit) for unit in job.listing.units if f"{unit.number:07d}.json" not in done]
    if todo:
        for _ in tasks.run(_predict, todo, len(todo), "predict: %d of %d units", on_gpus=True):
            pass
    outcome = _complete(job)
    _write(job.out, INFO_FILE, _json(replace(job.info, finished=True)))
    return outcome


def _complete(job: Job) -> Outcome:
    """Counts what the units' records say, and writes the lists that they make together."""
    names, turned = [], 0
    left_out: dict[str, str] = {}
    for record in records(job):
        names += [each.name for each in record.masks]
        turned += sum(each.turned for each in record.masks)
        left_out |= record.left_out
    if left_out:
        _write(job.out, LEFT_OUT_FILE, "".join(f"{key}: {why}\n" for key, why in sorted(left_out.items())))
    if not names:
        key, why = min(left_out.items())
        raise UserError(f"{job.listing.root}: none of its {len(left_out)} images can be read; {key}: {why}")
    if VOC in job.info.options:
        named = zip(job.classes, job.palette, strict=True)
        colors = [f"{name}:{red},{green},{blue}::\n" for name, (red, green, blue) in named]
        _write(job.out, _LABELMAP, "".join(["# label:color_rgb:parts:actions\n", *colors]))
        _write(job.out, _VOC_LIST, "".join(f"{name}\n" for name in names))
    return Outcome(len(names), len(left_out), turned)


def records(job: Job) -> Iterator[UnitRecord]:
    """What came of each unit, in order.

    Raises:
        UserError: one is missing or damaged.
    """
    uris = [record_file(job.out, unit) for unit in job.listing.units]
    for uri, data in zip(uris, ahead(lambda uri: retried(lambda: storage.read_bytes(uri)), uris), strict=True):
        try:
            yield read_record(UnitRecord, data)
        except ValueError as error:
            raise UserError(f"{uri}: damaged ({error}); delete it and give the command again") from error


def shown(job: Job, names: set[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Some of the images with their masks, read again.

    Yields:
        Name, photo as uint8 [H,W,3] or of other bands, class ids as uint8 [H,W].
    """
    bands = bands_of(describe(job.recipe.checkpoint).about)
    patience = Patience()
    for unit in job.listing.units:
        wanted = names.intersection(unit.names)
        if not wanted:
            continue
        for at, data in read_images(unit, patience, wanted):
            name = unit.names[at]
            mask = decode_mask(storage.read_bytes(storage.join(job.recipe.masks, f"{name}.png")))
            yield name, read_pixels(data, bands), mask


def clear(out: str) -> None:
    """Deletes what predict has written at `out`: first what makes units done, last what says that the rest is its."""
    listed = storage.join(out, NAMES_FILE)
    names = set(storage.read_lines(listed)) if storage.exists(listed) else set()
    own = [file for file in files_below(out) if _is_own(_HALF.sub("", file), names)]
    done = [file for file in own if file.startswith("units/") and file.endswith(".json")]
    rest = set(own) - {*done, NAMES_FILE, INFO_FILE}
    for files in (done, rest, [NAMES_FILE]):
        with ThreadPoolExecutor(DELETES) as threads:
            list(threads.map(lambda file: storage.delete(storage.join(out, file)), files))
    folders = {file[:at] for file in own for at, char in enumerate(file) if char == "/"}
    for folder in sorted(folders, key=len, reverse=True):
        storage.delete_empty(storage.join(out, folder))
    storage.delete(storage.join(out, INFO_FILE))


def _is_own(file: str, names: set[str]) -> bool:
    """Whether predict has written a file of this name, without what marks half a write."""
    folder, _, rest = file.partition("/")
    endings = _OWN.get(folder, ())
    return _FIXED.fullmatch(file) is not None or any(
        rest.endswith(ending) and rest.removesuffix(ending) in names for ending in endings
    )


def _json(info: PredictionsInfo) -> str:
    return json.dumps(asdict(info), indent=1) + "\n"


def _write(out: str, name: str, data: str) -> None:
    retried(lambda: storage.write_bytes(storage.join(out, name), data.encode()))


# ---- one unit -----------------------------------------------------------------------------------------------------


def _predict(task: tuple[Recipe, Unit]) -> None:
    """Makes one unit; runs in a Ray worker."""
    recipe, unit = task
    _writer(recipe).write(unit)


@lru_cache(maxsize=1)
def _writer(recipe: Recipe) -> "MaskWriter":
    """The network, loaded once per worker process."""
    return MaskWriter(recipe, task_device())
