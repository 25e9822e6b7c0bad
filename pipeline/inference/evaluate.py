"""Scores of a whole set from one confusion matrix: every pixel counts once, whatever image it is in."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.batch import padding_of
from pipeline.config.parse import suggest
from pipeline.config.schema import EvalConfig
from pipeline.datasets.images import DecodeError, decode_image, decode_mask
from pipeline.datasets.prepared.dataset import Dataset, read_group
from pipeline.errors import UserError
from pipeline.inference.logits import sliding, whole
from pipeline.patience import Patience

# ---- scores of a set --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Scores out of a confusion matrix, each 0..1."""

    miou: float
    """Mean of the IoU of the classes; 0 if nothing was scored."""
    iou: tuple[float | None, ...]
    """Intersection over union by class; None for an absent class."""
    pixel_accuracy: float
    """Share of right pixels; 0 if nothing was scored."""


class ConfusionMatrix:
    """Counts pixels by (target, prediction).

    Args:
        num_classes: C.
        ignore_index: target value of pixels that are not scored.
        device: where the counts are kept; that of the predictions.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        """int64 [C,C]: row = target, column = prediction."""

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Adds pixels.

        Args:
            pred: uint8 or int64 [...], 0..C-1.
            target: uint8 or int64 of the same shape, 0..C-1 or the ignore index.

        Raises:
            ValueError: a target is neither a class nor the ignore index.
        """
        cells = target.long() * self.num_classes + pred.long() + 1
        cells = cells.masked_fill(target == self.ignore_index, 0)  # cell 0 gathers what is not scored
        counts = torch.bincount(cells.flatten(), minlength=self.num_classes**2 + 1)
        if len(counts) > self.num_classes**2 + 1:
            raise ValueError(f"a target is neither one of {self.num_classes} classes nor {self.ignore_index}")
        self.matrix += counts[1:].view_as(self.matrix)

    def all_reduce(self) -> None:
        """Adds up the counts of all ranks, on all ranks; nothing happens in a single process."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.matrix)

    @property
    def intersection(self) -> Tensor:
        """Right pixels by class, int64 [C]."""
        return self.matrix.diagonal()

    @property
    def union(self) -> Tensor:
        """Pixels by class that are or were said to be of it, int64 [C]."""
        return self.matrix.sum(0) + self.matrix.sum(1) - self.intersection

    def scores(self, absent: Literal["skip", "zero"] = "skip") -> Scores:
        """The scores so far.

        Args:
            absent: what a class counts that no target and no prediction names. skip: it is left out of the mean
                and its IoU is None. zero: 0, as in the U2PL release. A class that is predicted but never the
                target counts 0 either way.
        """
        pairs = zip(self.intersection.tolist(), self.union.tolist(), strict=True)
        empty = None if absent == "skip" else 0.0
        iou = tuple(right / total if total else empty for right, total in pairs)
        present = [value for value in iou if value is not None]
        pixels = int(self.matrix.sum())
        return Scores(
            miou=sum(present) / max(len(present), 1),
            iou=iou,
            pixel_accuracy=int(self.intersection.sum()) / max(pixels, 1),
        )


# ---- scoring a network ------------------------------------------------------------------------------------------


MAX_IMAGES = 8
"""Images in a batch."""
MAX_PIXELS = 1 << 21
"""Pixels in a batch of more than one image: one of Cityscapes, eight of VOC."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Sample(NamedTuple):
    """An image and its truth."""

    id: str
    image: np.ndarray
    """uint8 [H,W,3]."""
    mask: np.ndarray
    """uint8 [H,W]: class ids or the ignore index."""


class ScoredGroup(NamedTuple):
    """A row group, and which of its rows are scored."""

    shard: str
    row_group: int
    rows: tuple[int, ...]
    """Positions inside the row group, ascending."""


def evaluate(
    predictor: nn.Module,
    dataset: Dataset,
    config: EvalConfig,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    patience: Patience | None = None,
) -> ConfusionMatrix:
    """Counts this rank's share of the validation set; add up the ranks with `ConfusionMatrix.all_reduce`.

    Args:
        predictor: maps uint8 images [B,3,H,W] to logits [B,C,h,w]; it is in eval mode meanwhile.
        dataset: its val subset is scored, at the stored size.
        config: whole or sliding, scale and window.
        device: that of the predictor.
        rank: takes every `world`-th row group from this one on.
        world: number of ranks.
        patience: with the storage; None: the usual one.

    Raises:
        UserError: there are no validation images, or one has no mask or cannot be decoded.
    """
    groups = scored_groups(dataset)
    logits = scorer(predictor, dataset, config)
    matrix = ConfusionMatrix(len(dataset.info.classes), dataset.info.ignore_index, device)
    # no_grad, not inference_mode: what a network caches meanwhile must stay usable in training
    with eval_mode(predictor), torch.no_grad():
        for samples in ahead(partial(read_samples, dataset, patience=patience), groups[rank::world]):
            for image, mask in map(stacked, batches(samples)):
                matrix.update(logits(image.to(device), scale=config.scale).argmax(1), mask.to(device))
    return matrix


def scorer(predictor: nn.Module, dataset: Dataset, config: EvalConfig) -> Callable[..., Tensor]:
    """`whole` or `sliding` of the predictor, as the config or the dataset says; takes images and `scale`."""
    mode = dataset.info.evaluation if config.mode == "dataset" else config.mode
    if mode != "sliding":
        return partial(whole, predictor)
    return partial(sliding, predictor, window=config.window, colour=padding_of(dataset.info.mean))


def scored_groups(dataset: Dataset, subset: str = "val") -> list[ScoredGroup]:
    """The row groups that hold the images of a subset, in stored order; of train only images with a mask.

    Raises:
        UserError: there are none.
    """
    index = dataset.subset(subset)
    if subset == "train":
        index = index.filter(pc.field("mask_bytes") > 0)
    rows: dict[tuple[str, int], list[int]] = {}
    for entry in index.select(["shard", "row_group", "row"]).to_pylist():
        rows.setdefault((entry["shard"], entry["row_group"]), []).append(entry["row"])
    if not rows:
        what = "validation images" if subset == "val" else f"{subset} images with a mask"
        raise UserError(f"{dataset.root}: no {what}; prepare the dataset with some")
    return [ScoredGroup(shard, group, tuple(sorted(members))) for (shard, group), members in rows.items()]


def read_samples(dataset: Dataset, group: ScoredGroup, patience: Patience | None = None) -> list[Sample]:
    """Reads and decodes the images of a row group.

    Raises:
        UserError: an image has no mask or cannot be decoded. Leaving it out would change the score silently.
    """
    table = read_group(dataset.root, group.shard, group.row_group, ["id", "image", "mask"], patience)
    return [_sample(dataset.root, row) for row in table.take(list(group.rows)).to_pylist()]


def spread(dataset: Dataset, count: int) -> list[str]:
    """Ids of `count` validation images, evenly over the set in stored order; of all images if there are fewer."""
    ids = dataset.subset("val").column("id").to_pylist()
    return [ids[place] for place in np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)]


def read_images(dataset: Dataset, ids: Sequence[str], patience: Patience | None = None) -> list[Sample]:
    """Reads and decodes these validation images, in this order.

    Raises:
        UserError: there is no such image, or it has no mask or cannot be decoded.
    """
    places = {each["id"]: each for each in dataset.subset("val").to_pylist()}
    for name in ids:
        if name not in places:
            raise UserError(f"{dataset.root}: no validation image {name}{suggest(name, list(places))}")
    groups = [ScoredGroup(places[name]["shard"], places[name]["row_group"], (places[name]["row"],)) for name in ids]
    return [read_samples(dataset, group, patience)[0] for group in groups]


def _sample(root: str, row: dict[str, str | bytes | None]) -> Sample:
    name, image, mask = row["id"], row["image"], row["mask"]
    assert isinstance(name, str)
    assert isinstance(image, bytes)
    if not isinstance(mask, bytes):
        raise UserError(f"{root}: validation image {name} has no mask; prepare the dataset again")
    try:
        return Sample(name, decode_image(image), decode_mask(mask))
    except DecodeError as error:
        raise UserError(f"{root}: image {name}: {error}; prepare the dataset again") from error


def batches(samples: Iterable[Sample], size: int | None = None) -> Iterator[list[Sample]]:
    """Joins neighbours of one size.

    Args:
        samples: images with masks.
        size: how many at most, whatever their pixels; None: `MAX_IMAGES`, and of several at most `MAX_PIXELS`.
    """
    images, pixels = (size, math.inf) if size else (MAX_IMAGES, MAX_PIXELS)
    batch: list[Sample] = []
    for sample in samples:
        other_size = batch and batch[0].mask.shape != sample.mask.shape
        if batch and (other_size or len(batch) == images or (len(batch) + 1) * sample.mask.size > pixels):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def stacked(batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Images of one size as tensors: uint8 [B,3,H,W], and their masks, uint8 [B,H,W]."""
    image = torch.from_numpy(np.stack([sample.image for sample in batch]))
    return image.permute(0, 3, 1, 2), torch.from_numpy(np.stack([sample.mask for sample in batch]))


def ahead(load: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields `load(item)` in order; one thread is always one item ahead."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in items:
            following = pool.submit(load, item)
            if pending:
                yield pending.result()
            pending = following
        if pending:
            yield pending.result()


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode for the block, and each of its submodules back into its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
