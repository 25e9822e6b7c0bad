"""One encoded sample to its views: decoding, the weak view, the strong ones.

A pure function of the sample and the recipe, so it gives the same pixels in any thread, process or machine.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.batch import Views
from pipeline.config import DataConfig
from pipeline.datasets.decode import DecodeError, decode_mask, decode_reduced, decode_rgb, read_header, reduce
from pipeline.ingest import views as geometry
from pipeline.ingest.photometric import fill_strong
from pipeline.ingest.randomness import generator
from pipeline.ingest.sources import Sample

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Gives memory for a tensor of a shape and type; its content is arbitrary."""


@dataclass(frozen=True)
class Recipe:
    """What views depend on besides their sample."""

    data: DataConfig
    """Crop, scale, flip, hue."""
    seed: int
    strong: int
    """How many strong views an unlabeled sample gets."""


class Outcome(NamedTuple):
    """What became of a sample."""

    seconds: float
    """CPU time of the thread that decoded it."""
    problem: str
    """Why it could not be used; empty if it could."""


def empty_views(samples: Sequence[Sample], recipe: Recipe, allocate: Allocate) -> Views:
    """Room for the views of `samples`, of which all have a mask, all have a label, or all have neither."""
    count, (height, width) = len(samples), recipe.data.crop
    labeled = samples[0].mask is not None

    def images() -> Tensor:
        return allocate((count, 3, height, width), torch.uint8)

    def classes(encoded: memoryview | bytes | None) -> Tensor | None:
        return None if encoded is None else allocate((count, height, width), torch.int64)

    return Views(
        images(),
        classes(samples[0].mask),
        allocate((count, height, width), torch.bool),
        tuple(sample.id for sample in samples),
        () if labeled else tuple(images() for _ in range(recipe.strong)),
        classes(samples[0].label),
    )


def view_bytes(recipe: Recipe, *, classes: bool, strong: int = 0) -> int:
    """Memory that one sample takes with or without a mask or pseudo-label, and with some strong views."""
    pixel = 3 + 1 + 8 * classes + 3 * strong
    return pixel * recipe.data.crop[0] * recipe.data.crop[1]


def fill(sample: Sample, recipe: Recipe, views: Views, place: int) -> Outcome:
    """Decodes one sample into row `place` of the views; a damaged one leaves views of which no pixel counts."""
    began = time.thread_time()
    image, valid = views.image[place].numpy(), views.valid[place].numpy()
    masks = [each[place].numpy() for each in (views.mask, views.pseudo) if each is not None]
    strong = [view[place].numpy() for view in views.strong]
    problem = ""
    try:
        window = _fill_weak(sample, recipe, image, masks)
        geometry.mark_shown(window, valid)
        area = geometry.shown(window, recipe.data.crop[1])
        for number, view in enumerate(strong):
            rng = generator(recipe.seed, sample.epoch, sample.id, "strong", number)
            fill_strong(image, area, recipe.data, rng, view)
    except DecodeError as error:
        problem = str(error)
        valid[:] = False
        for view in (image, *strong):
            view[:] = geometry.MEAN_COLOUR[:, None, None]
        for mask in masks:
            mask[:] = geometry.IGNORE
    return Outcome(time.thread_time() - began, problem)


def _fill_weak(sample: Sample, recipe: Recipe, image: np.ndarray, masks: Sequence[np.ndarray]) -> geometry.Window:
    """The window is drawn for the stored size; then no more pixels are decoded than it needs."""
    picture = read_header(sample.image)
    width, height = picture.size
    rng = generator(recipe.seed, sample.epoch, sample.id, "unlabeled" if sample.mask is None else "labeled")
    window = geometry.draw_window(height, width, recipe.data, rng)
    factor = reduce(picture, geometry.reduction(window))
    if factor == 1:
        part = decode_rgb(picture, window.source)
    else:
        part = decode_reduced(picture, window.source, factor, window.target[2:])
    geometry.cut_image(part, window, image)
    encoded = [each for each in (sample.mask, sample.label) if each is not None]
    for each, mask in zip(encoded, masks, strict=True):
        classes = decode_mask(each)
        if classes.shape != (height, width):
            raise DecodeError("image and mask have different sizes")
        geometry.cut_mask(classes, window, mask)
    return window
