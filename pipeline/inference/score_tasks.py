"""The scores of a checkpoint on a prepared dataset, on Ray: each task scores the images of one row group."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from pipeline import checkpoint, storage
from pipeline.batch import PADDING_COLOUR, padding_of
from pipeline.cluster import tasks
from pipeline.config import cli
from pipeline.config.schema import EvalConfig
from pipeline.datasets.files import escaped, is_junk
from pipeline.datasets.images import encode_png
from pipeline.datasets.pools.place import files_below
from pipeline.datasets.prepared.dataset import Dataset, open_dataset
from pipeline.datasets.specs import KNOWN
from pipeline.errors import UserError
from pipeline.inference.evaluate import Sample, ScoredGroup, batches, read_samples, scored_groups, scorer, stacked
from pipeline.inference.load import autocast, open_data, restore, task_device
from pipeline.inference.logits import combined
from pipeline.inference.mask_writer import palette_png
from pipeline.inference.measures import Bad, Measures, Tally, measures
from pipeline.inference.pictures import side_by_side
from pipeline.inference.units import list_images, name_of
from pipeline.methods import OPTIONS, Predictor
from pipeline.patience import Patience

WHOLE, SLIDING, CROP = "whole", "sliding", "voc_crop513"
CROP_SIDE = 513
LARGEST_SCALE = 8.0
"""An image has 64 times its pixels then; more is a slip of the keyboard."""


@dataclass(frozen=True)
class Way:
    """How a network looks at an image, and which pixels are scored."""

    mode: str
    """`WHOLE`, `SLIDING` or `CROP`."""
    window: tuple[int, int]
    """Height and width, if it slides."""
    scales: tuple[float, ...]
    """Of the stored size; probabilities are averaged over them."""
    flip: bool
    """Average over mirrored images, too."""

    def __str__(self) -> str:
        """For people: `sliding 769x769, scales 0.5 1, flip`."""
        mode = f"{self.mode} {self.window[0]}x{self.window[1]}" if self.mode == SLIDING else self.mode
        scales = "" if self.scales == (1.0,) else f", scales {' '.join(f'{scale:g}' for scale in self.scales)}"
        return f"{mode}{scales}{', flip' if self.flip else ''}"


@dataclass(frozen=True)
class Recipe:
    """What each task has to know."""

    checkpoint: str
    root: str
    """Of the dataset."""
    way: Way
    batch: int | None
    """Images at a time; None: as many as in training."""
    pictures: bool
    """Whether pictures of the worst images are wanted."""
    submission: str | None
    """Where to write the predictions of the first network, if they are wanted."""


@dataclass(frozen=True)
class Job:
    """What one command asks for."""

    recipe: Recipe
    dataset: Dataset
    subset: str
    groups: Sequence[ScoredGroup]
    usual: bool
    """Whether this is how the run scores itself."""

    @property
    def images(self) -> int:
        """How many are scored."""
        return sum(len(group.rows) for group in self.groups)

    @property
    def absent(self) -> Literal["skip", "zero"]:
        """What an absent class counts: as in the release where its way is taken."""
        return "zero" if self.recipe.way.mode == CROP else "skip"

    def measures(self, tally: Tally) -> Measures:
        """The measures of a tally of this job."""
        return measures(tally, self.absent)


# ---- the job ----------------------------------------------------------------------------------------------------


def plan(
    run: str,
    data: str | None = None,
    subset: str = "val",
    *,
    mode: str | None = None,
    window: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch: int | None = None,
    pictures: bool = False,
    submission: str | None = None,
) -> Job:
    """Looks at run and dataset, and whether the flags fit them; opens no image.

    Args:
        run: run directory, whose newest checkpoint is taken, or checkpoint folder.
        data: prepared dataset; None: the one of the run.
        subset: val, or train, of which the images with a mask are scored.
        mode: `WHOLE`, `SLIDING` or `CROP`; None: as the run scores itself.
        window: height and width; None: `eval.window` of the run.
        scales: factors of `eval.scale` of the run.
        flip: look at mirrored images, too.
        batch: images at a time; None: as many as in training.
        pictures: keep pictures of the worst images.
        submission: folder for the predictions; None: none are written.

    Raises:
        UserError: run or dataset cannot be used, or a flag does not fit them.
    """
    place = checkpoint.find(storage.absolute(run))
    meta = checkpoint.read_meta(place)
    config = cli.resolve(meta.config, OPTIONS)
    dataset = open_data(config, meta.data["classes"], data)
    if batch is not None and batch < 1:
        raise UserError(f"--batch {batch}: at least 1")
    if not scales or not all(0 < scale <= LARGEST_SCALE for scale in scales):
        raise UserError(f"--scales {' '.join(f'{each:g}' for each in scales)}: above 0, at most {LARGEST_SCALE:g}")
    way = _way(config.eval, dataset, mode, window, scales, flip=flip)
    recipe = Recipe(place, dataset.root, way, batch, pictures, storage.absolute(submission) if submission else None)
    job = Job(recipe, dataset, subset, scored_groups(dataset, subset), way == _way(config.eval, dataset))
    if recipe.submission:
        _check_submission(job, recipe.submission)
    return job


def _way(
    config: EvalConfig,
    dataset: Dataset,
    mode: str | None = None,
    window: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    *,
    flip: bool = False,
) -> Way:
    """The way that flags and config name together; of the config alone, if no flag is given."""
    stored = dataset.info.evaluation if config.mode == "dataset" else config.mode
    way = Way(mode or stored, window or config.window, tuple(config.scale * scale for scale in scales), flip)
    if window and way.mode != SLIDING:
        raise UserError(f"--window is for --mode {SLIDING}; here it is {way.mode}")
    if window and min(window) < 1:
        raise UserError(f"--window {window[0]} {window[1]}: at least 1 pixel")
    if way.mode == CROP and dataset.info.background != 0:
        raise UserError(
            f"--mode {CROP}: pads masks with class 0, which is background in VOC, but {dataset.info.classes[0]} in "
            f"{dataset.root}; take {WHOLE} or {SLIDING}"
        )
    if way.mode == SLIDING and (mode or window):
        sizes = dataset.index.select(["height", "width"]).to_pydict()
        largest = [max(sizes[side], default=0) * max(way.scales) for side in ("height", "width")]
        if all(of_window >= side for of_window, side in zip(way.window, largest, strict=True)):
            raise UserError(
                f"--mode {SLIDING}: the window of {way.window[0]}x{way.window[1]} covers every image of {dataset.root} "
                f"(at most {largest[0]:g}x{largest[1]:g}), so nothing slides; name a smaller one with --window H W"
            )
    return way


def _check_submission(job: Job, out: str) -> None:
    """Refuses a submission that could not be written, or that would lie among other files."""
    if job.recipe.way.mode == CROP:
        raise UserError(f"--export_submission wants whole images; leave out --mode {CROP}")
    units = list_images(job.dataset.root, job.subset).units
    odd = next((key for unit in units for key, name in zip(unit.ids, unit.names, strict=True) if not name), None)
    if odd is not None:
        raise UserError(f"{job.dataset.root}: no file can be called {odd}; prepare the dataset with other names")
    expected = {f"{name}.png" for unit in units for name in unit.names}
    for file in files_below(out):
        if not is_junk(file) and file not in expected:
            raise UserError(f"{out}: holds other files, such as {escaped(file)}; choose an empty --export_submission")


def score(job: Job) -> dict[str, Tally]:
    """Scores every network of the checkpoint, each image once; any cluster and any `batch` count the same.

    Returns:
        Tallies by network; the first network is the method's result.

    Raises:
        UserError: checkpoint or images cannot be read, or the storage refuses.
    """
    todo = [(job.recipe, group) for group in job.groups]
    found: dict[str, Tally] = {}
    for part in tasks.run(_score, todo, len(todo), "evaluate: %d of %d row groups", on_gpus=True):
        for name, tally in part.items():
            if name in found:
                found[name].add(tally)
            else:
                found[name] = tally
    return found


# ---- one task ---------------------------------------------------------------------------------------------------


def _score(task: tuple[Recipe, ScoredGroup]) -> dict[str, Tally]:
    """Scores one row group; runs in a Ray worker."""
    recipe, group = task
    return _scorer(recipe).tally(group)


@lru_cache(maxsize=1)
def _scorer(recipe: Recipe) -> "GroupScorer":
    """The networks, loaded once per worker process."""
    return GroupScorer(recipe, task_device())


class GroupScorer:
    """The networks of a checkpoint, which count what they get right. Knows nothing of Ray."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        """Loads the networks.

        Raises:
            UserError: the checkpoint or the dataset cannot be used.
        """
        self._recipe, self._device = recipe, device
        self._config, method = restore(recipe.checkpoint, device)
        self._dataset = open_dataset(recipe.root)
        self._patience = Patience(self._config.run.storage_patience)
        mode = SLIDING if recipe.way.mode == SLIDING else WHOLE
        way = replace(self._config.eval, mode=mode, window=recipe.way.window)
        self._networks = {
            name: scorer(Predictor(network).eval(), self._dataset, way) for name, network in method.networks().items()
        }

    @torch.no_grad()
    def tally(self, group: ScoredGroup) -> dict[str, Tally]:
        """Counts the images of a row group, by network; writes their part of the submission."""
        recipe, info = self._recipe, self._dataset.info
        samples = read_samples(self._dataset, group, self._patience)
        if recipe.way.mode == CROP:
            samples = [release_crop(sample, padding_of(self._dataset.info.mean)) for sample in samples]
        found = {name: Tally(len(info.classes), info.ignore_index, self._device) for name in self._networks}
        for batch in batches(samples, recipe.batch):
            image, mask = (each.to(self._device) for each in stacked(batch))
            for at, (name, logits) in enumerate(self._networks.items()):
                with autocast(self._device, self._config.run):
                    seen = combined(logits, image, recipe.way.scales, mirror=recipe.way.flip)
                pred = seen.argmax(1)
                found[name].update([sample.id for sample in batch], seen.softmax(1), pred, mask)
                predicted = pred.byte().cpu().numpy()
                if recipe.pictures:
                    self._picture(found[name], batch, predicted)
                if recipe.submission and at == 0:
                    self._write(recipe.submission, batch, predicted)
        return {name: tally.to("cpu") for name, tally in found.items()}

    def _picture(self, tally: Tally, batch: Sequence[Sample], predicted: np.ndarray) -> None:
        """Keeps pictures of the images of a batch that are among the worst so far."""
        for sample, mask in zip(batch, predicted, strict=True):
            miou = tally.images.get(sample.id)
            if miou is not None and tally.admits(miou, sample.id):
                picture = side_by_side(sample.image, (sample.mask, mask), self._dataset.info.palette)
                tally.keep([Bad(miou, sample.id, picture)])

    def _write(self, out: str, batch: Sequence[Sample], predicted: np.ndarray) -> None:
        for sample, mask in zip(batch, predicted, strict=True):
            uri, data = storage.join(out, f"{name_of(sample.id)}.png"), submitted(mask, self._dataset)
            self._patience.retried(lambda uri=uri, data=data: storage.write_bytes(uri, data))


def release_crop(sample: Sample, padding: Sequence[int] = PADDING_COLOUR) -> Sample:
    """What the U2PL release scores of a VOC image: a window of 513x513 in the middle.

    A smaller image is padded on all sides, with the mean colour, and its mask with class 0: the padding is scored, as
    background.
    """
    image = np.full((CROP_SIDE, CROP_SIDE, len(padding)), padding, np.uint8)
    mask = np.zeros((CROP_SIDE, CROP_SIDE), np.uint8)
    (into_y, from_y), (into_x, from_x) = map(_middle, sample.mask.shape)
    image[into_y, into_x] = sample.image[from_y, from_x]
    mask[into_y, into_x] = sample.mask[from_y, from_x]
    return Sample(sample.id, image, mask)


def _middle(length: int) -> tuple[slice, slice]:
    """Along one axis, the part of the window that an image fills, and the part of the image that fills it."""
    size, gap, start = min(length, CROP_SIDE), max(CROP_SIDE - length, 0) // 2, max(length - CROP_SIDE, 0) // 2
    return slice(gap, gap + size), slice(start, start + size)


def submitted(mask: np.ndarray, dataset: Dataset) -> bytes:
    """A prediction as the servers of Cityscapes and VOC take it.

    Args:
        mask: class ids, uint8 [H,W].
        dataset: with the classes of Cityscapes, or others.

    Returns:
        A PNG: grey with the label ids of Cityscapes, or class ids with the dataset's palette, VOC's in the case of VOC.
    """
    cityscapes = KNOWN["cityscapes"]
    if dataset.info.classes != cityscapes.classes:
        return palette_png(mask, dataset.info.palette)
    label_of = {index: label for label, index in cityscapes.label_ids.items()}
    return encode_png(np.array([label_of[index] for index in range(len(cityscapes.classes))], np.uint8)[mask])
