"""What a method sees in images at a step: prediction, entropy, which pixels it relies on, what the others teach.

For people to look at: every question goes to the method's hooks (`Method.partition`), and nothing of it is changed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.datasets.images import shown
from pipeline.datasets.prepared.dataset import Dataset
from pipeline.inference.evaluate import Sample, eval_mode, scorer
from pipeline.inference.load import autocast
from pipeline.inference.pictures import RELIABILITY_LEGEND, Colour, class_legend, colour_mask, heat, panel, reliability
from pipeline.methods import Method, Step
from pipeline.ops.entropy import IGNORE, relative_entropy
from pipeline.ops.grid import shrink

NO_NEGATIVE: Colour = (236, 236, 236)
"""Pixels that are negatives of no class."""
TILE = 192
"""The longer side of a picture of one class, in pixels."""


class Look(NamedTuple):
    """One image as a method sees it. Larger images are thinned out: each pixel here is one of the image's own."""

    id: str
    image: np.ndarray
    """uint8 [h,w,3]."""
    truth: np.ndarray
    """uint8 [h,w], class ids, 255 ignored."""
    prediction: np.ndarray
    """int64 [h,w], the likeliest class by the method's result."""
    entropy: np.ndarray
    """float32 [h,w], as a share of log C: 0..1."""
    reliable: np.ndarray | None
    """bool [h,w], pixels that would carry a pseudo-label; None: the method parts no pixels."""
    negative: np.ndarray | None
    """bool [C,h,w], the classes that each pixel could be a negative of; None: the method takes no negatives."""
    nearest: np.ndarray | None
    """int64 [h,w], the likeliest of those classes, 255 where there is none; None as `negative`."""


@torch.no_grad()
def look(
    method: Method, samples: Sequence[Sample], dataset: Dataset, config: Config, step: Step, side: int
) -> list[Look]:
    """Asks a method about images; its modes, statistics and random numbers stay as they are.

    Args:
        method: in any mode; its result is asked, the first of its networks.
        samples: at least one; a threshold that is a quantile is that of all their pixels.
        dataset: says how images are scored, unless the config does.
        config: of the run.
        step: whose thresholds the method takes.
        side: pixels of the longer side of what is returned, at most.
    """
    predictor = method.predictor()
    device = next(predictor.parameters()).device
    logits_of = scorer(predictor, dataset, config.eval)
    seen: list[Tensor] = []
    with eval_mode(predictor):
        for sample in samples:
            image = _planes(sample.image)[None].to(device)
            with autocast(device, config.run):
                logits = logits_of(image, scale=config.eval.scale)[0]
            seen.append(_thinned(logits, side).float().cpu())
    parts = method.partition(torch.cat([logits.flatten(1).T for logits in seen]), step)
    ends = np.cumsum([logits[0].numel() for logits in seen])
    looks = []
    for sample, logits, end in zip(samples, seen, ends, strict=True):
        classes, *size = logits.shape
        own = slice(end - logits[0].numel(), end)
        negative = None if parts is None or parts.negative is None else parts.negative[own].T.reshape(classes, *size)
        looks.append(
            Look(
                id=sample.id,
                image=_thinned(_planes(shown(sample.image)), side).permute(1, 2, 0).numpy(),
                truth=_thinned(torch.from_numpy(sample.mask.copy())[None], side)[0].numpy(),
                prediction=logits.argmax(0).numpy(),
                entropy=relative_entropy(logits).numpy(),
                reliable=None if parts is None else parts.reliable[own].reshape(*size).numpy(),
                negative=None if negative is None else negative.numpy(),
                nearest=None if negative is None else _nearest(logits, negative).numpy(),
            )
        )
    return looks


def _planes(image: np.ndarray) -> Tensor:
    """uint8 [H,W,B] as [B,H,W]."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def _thinned(values: Tensor, side: int) -> Tensor:
    """Some pixels of [K,H,W], evenly, so that the longer side has at most `side` of them; no two are mixed."""
    height, width = values.shape[1:]
    longest = max(height, width, side)
    return shrink(values, (max(1, height * side // longest), max(1, width * side // longest)))


def _nearest(logits: Tensor, negative: Tensor) -> Tensor:
    """The likeliest class of each pixel's negatives, from [C,h,w] to int64 [h,w]; 255 where there is none."""
    found = logits.masked_fill(~negative, -torch.inf).argmax(0)
    return found.masked_fill(~negative.any(0), IGNORE)


def drawn(looks: Sequence[Look], dataset: Dataset) -> Image.Image:
    """A row for each image: image, truth, prediction, entropy, and what the method says of its pixels."""
    info = dataset.info
    rows = [_row(each, info.palette) for each in looks]
    legend = class_legend(info)
    if looks[0].reliable is not None:
        legend += RELIABILITY_LEGEND
    if looks[0].nearest is not None:
        legend += [("negative of no class", NO_NEGATIVE)]
    return panel(rows, list(rows[0]), legend)


def _row(seen: Look, palette: Sequence[Colour]) -> dict[str, np.ndarray]:
    row = {
        "image": seen.image,
        "truth": colour_mask(seen.truth, palette),
        "prediction": colour_mask(seen.prediction, palette),
        "entropy": heat(seen.entropy),
    }
    if seen.reliable is not None:
        row["reliable"] = reliability(seen.reliable)
    if seen.nearest is not None:
        row["negative of"] = colour_mask(seen.nearest, palette, other=NO_NEGATIVE)
    return row


def drawn_negatives(looks: Sequence[Look], dataset: Dataset) -> Image.Image:
    """A row for each image, with a picture for each class: its colour where a pixel is a negative of it."""
    info, rows = dataset.info, []
    for seen in looks:
        assert seen.negative is not None
        every = -(-max(seen.truth.shape) // TILE)
        tiles = zip(info.classes, info.palette, seen.negative[:, ::every, ::every], strict=True)
        colours = {
            name: np.where(mask[..., None], colour, NO_NEGATIVE).astype(np.uint8) for name, colour, mask in tiles
        }
        rows.append({"image": seen.image[::every, ::every], **colours})
    return panel(rows, list(rows[0]), [("no negative of the class", NO_NEGATIVE)])
