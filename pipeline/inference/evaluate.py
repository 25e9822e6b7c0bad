"""The score of a network on a dataset's validation set, in the training loop or on its own.

Batches never cross a row group, so they are the same for any number of ranks, and so is every number.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import EvalConfig
from pipeline.datasets.decode import DecodeError, decode_image, decode_mask
from pipeline.datasets.format import Dataset, read_group
from pipeline.errors import UserError
from pipeline.inference.metrics import ConfusionMatrix
from pipeline.inference.predict import sliding, whole

MAX_IMAGES = 8
"""Images in a batch."""
MAX_PIXELS = 1 << 21
"""Pixels in a batch of more than one image: one of Cityscapes, eight of VOC."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Sample(NamedTuple):
    """A validation image."""

    id: str
    image: np.ndarray
    """uint8 [H,W,3]."""
    mask: np.ndarray
    """uint8 [H,W]: class ids or the ignore index."""


class Group(NamedTuple):
    """Where a row group is."""

    shard: str
    row_group: int
    rows: tuple[int, ...]
    """Which of its rows are validation images."""


def evaluate(
    predictor: nn.Module,
    dataset: Dataset,
    config: EvalConfig,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> ConfusionMatrix:
    """Counts this rank's share of the validation set; add up the ranks with `ConfusionMatrix.all_reduce`.

    Args:
        predictor: maps uint8 images [B,3,H,W] to logits [B,C,h,w]; it is in eval mode meanwhile.
        dataset: its val subset is scored, at the stored size.
        config: whole or sliding, scale and window.
        device: that of the predictor.
        rank: takes every `world`-th row group from this one on.
        world: number of ranks.

    Raises:
        UserError: there are no validation images, or one has no mask or cannot be decoded.
    """
    groups = val_groups(dataset)
    if not groups:
        raise UserError(f"{dataset.root}: no validation images; prepare the dataset with a val list")
    logits = scorer(predictor, dataset, config)
    matrix = ConfusionMatrix(len(dataset.info.classes), dataset.info.ignore_index, device)
    # no_grad, not inference_mode: what a network caches meanwhile must stay usable in training
    with eval_mode(predictor), torch.no_grad():
        for samples in ahead(partial(read_samples, dataset), groups[rank::world]):
            for image, mask in batches(samples):
                matrix.update(logits(image.to(device), scale=config.scale).argmax(1), mask.to(device))
    return matrix


def scorer(predictor: nn.Module, dataset: Dataset, config: EvalConfig) -> Callable[..., Tensor]:
    """`whole` or `sliding` of the predictor, as the config or the dataset says; takes images and `scale`."""
    mode = dataset.info.evaluation if config.mode == "dataset" else config.mode
    return partial(sliding, predictor, window=config.window) if mode == "sliding" else partial(whole, predictor)


def val_groups(dataset: Dataset) -> list[Group]:
    """The row groups that hold validation images, in stored order."""
    rows: dict[tuple[str, int], list[int]] = {}
    for entry in dataset.subset("val").select(["shard", "row_group", "row"]).to_pylist():
        rows.setdefault((entry["shard"], entry["row_group"]), []).append(entry["row"])
    return [Group(shard, group, tuple(sorted(members))) for (shard, group), members in rows.items()]


def read_samples(dataset: Dataset, group: Group) -> list[Sample]:
    """Reads and decodes the validation images of a row group.

    Raises:
        UserError: an image has no mask or cannot be decoded. Leaving it out would change the score silently.
    """
    table = read_group(dataset.root, group.shard, group.row_group, ["id", "image", "mask"])
    return [_sample(dataset.root, row) for row in table.take(list(group.rows)).to_pylist()]


def _sample(root: str, row: dict[str, str | bytes | None]) -> Sample:
    name, image, mask = row["id"], row["image"], row["mask"]
    assert isinstance(name, str)
    assert isinstance(image, bytes)
    if not isinstance(mask, bytes):
        raise UserError(f"{root}: validation image {name} has no mask; prepare the dataset again")
    try:
        return Sample(name, decode_image(image), decode_mask(mask))
    except DecodeError as error:
        raise UserError(f"{root}: validation image {name}: {error}; prepare the dataset again") from error


def batches(samples: Iterable[Sample]) -> Iterator[tuple[Tensor, Tensor]]:
    """Joins neighbours of one size.

    Yields:
        uint8 images [B,3,H,W] and uint8 masks [B,H,W], at most `MAX_IMAGES` and `MAX_PIXELS` (or one image).
    """
    batch: list[Sample] = []
    for sample in samples:
        other_size = batch and batch[0].mask.shape != sample.mask.shape
        if other_size or len(batch) == MAX_IMAGES or (len(batch) + 1) * sample.mask.size > MAX_PIXELS:
            yield from _stacked(batch)
            batch = []
        batch.append(sample)
    yield from _stacked(batch)


def _stacked(batch: list[Sample]) -> Iterator[tuple[Tensor, Tensor]]:
    if batch:
        image = torch.from_numpy(np.stack([sample.image for sample in batch]))
        yield image.permute(0, 3, 1, 2), torch.from_numpy(np.stack([sample.mask for sample in batch]))


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
    """Eval mode inside; afterwards each submodule is in the mode it had, be they different ones."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
