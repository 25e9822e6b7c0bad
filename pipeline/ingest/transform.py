"""A transform of the user's own on every training view, named by its dotted path (docs/adding-a-transform.md)."""

import sys
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

from pipeline.datasets.prepared.dataset import IGNORE_INDEX as IGNORE
from pipeline.errors import UserError

Transform = Callable[[np.ndarray, list[np.ndarray], np.random.Generator], tuple[np.ndarray, Sequence[np.ndarray]]]
"""From image uint8 [H,W,3] (or other bands), masks uint8 [H,W] and randomness to both anew, of the same shapes and
dtypes. The last mask is 0 where the view shows the image and 255 elsewhere; those before it are class ids, or
pseudo-labels, with 255 for what is ignored. All of them have to move alike."""


@lru_cache
def load(path: str) -> Transform:
    """The function that a dotted path names, as `package.module.function`; the working directory is looked in, too.

    Raises:
        UserError: there is no such function, or its module cannot be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        found = getattr(import_module(module), name)
    except Exception as error:  # whatever a module of the user's raises
        raise UserError(f"data.transform {path}: {_told(error)}; expected package.module.function") from error
    if not callable(found):
        raise UserError(f"data.transform {path}: is no function")
    return cast("Transform", found)


def check(path: str, crop: tuple[int, int], bands: int = 3) -> None:
    """Calls the transform as training does, on an image of so many bands and one mask of zeros.

    Raises:
        UserError: as `load` and `apply`.
    """
    image, mask = np.zeros((bands, *crop), np.uint8), np.zeros(crop, np.int64)
    apply(path, image, [mask], np.ones(crop, bool), np.random.default_rng(0), "of a trial call")


def apply(
    path: str, image: np.ndarray, masks: Sequence[np.ndarray], valid: np.ndarray, rng: np.random.Generator, name: str
) -> None:
    """Transforms a view in place.

    Args:
        path: see `load`.
        image: uint8 [3,H,W], or of other bands.
        masks: of class ids or pseudo-labels, int64 [H,W], 0..255.
        valid: bool [H,W], where the view shows the image.
        rng: decides everything.
        name: of the sample, for errors.

    Raises:
        UserError: the function fails, or gives something of another kind.
    """
    transform = load(path)
    planes = [mask.astype(np.uint8) for mask in masks] + [np.where(valid, 0, IGNORE).astype(np.uint8)]
    try:
        pixels, changed = transform(np.ascontiguousarray(image.transpose(1, 2, 0)), planes, rng)
        _refuse_others("image", pixels, (*valid.shape, len(image)))
        for plane in changed:
            _refuse_others("masks", plane, valid.shape)
        if len(changed) != len(planes):
            raise ValueError(f"masks: {len(changed)} instead of {len(planes)}")
    except Exception as error:
        raise UserError(f"data.transform {path}: {_told(error)} (image {name})") from error
    image[:] = pixels.transpose(2, 0, 1)
    valid[:] = changed[-1] != IGNORE
    for mask, plane in zip(masks, changed, strict=False):
        mask[:] = np.where(valid, plane, IGNORE)


def _refuse_others(what: str, found: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(found, np.ndarray) or found.dtype != np.uint8 or found.shape != shape:
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
        raise ValueError(f"{what}: {kind} instead of an array of uint8 {list(shape)}")


def _told(error: Exception) -> str:
    """The error in one line, with the place in the user's file."""
    here = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in here if "importlib" not in frame.filename]
    place = f", {own[-1].filename}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
