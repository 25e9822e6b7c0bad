"""Checks of single image and mask files; they come from outside, so nothing is taken for granted."""

import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets.images import DecodeError, decode_image, encode_png, open_image
from pipeline.datasets.prepared.dataset import IGNORE_INDEX
from pipeline.errors import UserError

_INVALID = -1
_MAT_MAGIC = b"MATLAB 5.0"


class BadSampleError(ValueError):
    """A file that cannot become part of a dataset; the message says why."""


def check_image(data: bytes) -> tuple[int, int]:
    """Decodes an image once to see that training can.

    Args:
        data: content of a JPEG or PNG file.

    Returns:
        Height and width in pixels, as stored (an EXIF rotation is not applied, as masks do not have it).

    Raises:
        BadSampleError: unreadable, too large, or of more than 8 bits a channel.
    """
    try:
        height, width, _ = decode_image(data).shape
    except DecodeError as error:
        raise BadSampleError(f"unreadable image ({error})") from error
    return height, width


def canonical_mask(
    data: bytes,
    size: tuple[int, int],
    lookup: NDArray[np.int16],
    colors: Mapping[int, int] | None = None,
) -> bytes:
    """Checks a mask and stores it in the one form that everything downstream reads.

    Args:
        data: content of a PNG file with 8 bits a pixel, grey or palette (palette indices are the values), or of
            one of SBD's `.mat` files.
        size: height and width of its image.
        lookup: [256], see `class_lookup`.
        colors: class id (or 255) by 0xRRGGBB; if there are any, a PNG file is a colour picture, and its
            colours are the values.

    Returns:
        A PNG file of mode L: class ids and 255.

    Raises:
        BadSampleError: unreadable, another size, other bit depth or channels, or a value that is no class.
        UserError: a `.mat` file, but scipy is not installed.
    """
    if data.startswith(_MAT_MAGIC):
        ids = _from_values(_mat_values(data), lookup)
    elif colors:
        ids = _from_colors(_open_mask(data), colors)
    else:
        ids = _from_values(_png_values(data), lookup)
    if ids.shape != size:
        raise BadSampleError(f"mask is {ids.shape[1]}x{ids.shape[0]}, its image {size[1]}x{size[0]}")
    return encode_png(ids)


def _png_values(data: bytes) -> NDArray[np.uint8]:
    image = _open_mask(data)
    if image.mode not in ("P", "L"):
        raise BadSampleError(f"mask mode {image.mode}: expected one channel of 8-bit class ids (grey or palette PNG)")
    return np.asarray(image)  # of mode P these are the palette indices; convert("L") would give grey values


def _mat_values(data: bytes) -> NDArray[np.uint8]:
    """The class ids in a file of SBD: field Segmentation of the struct GTcls."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError("masks of SBD need scipy on every node: pip install scipy") from error
    try:
        values = loadmat(io.BytesIO(data), variable_names=["GTcls"])["GTcls"][0]["Segmentation"][0]
    except Exception as error:  # scipy raises almost anything on damaged files
        raise BadSampleError(f"unreadable mask ({str(error) or type(error).__name__})") from error
    if values.dtype != np.uint8 or values.ndim != 2:
        raise BadSampleError(f"mask of {values.dtype} with {values.ndim} dimensions, expected uint8 with 2")
    return values


def _from_values(raw: NDArray[np.uint8], lookup: NDArray[np.int16]) -> NDArray[np.uint8]:
    counts = np.bincount(raw.ravel(), minlength=256)
    wrong = np.flatnonzero((counts > 0) & (lookup == _INVALID))
    if wrong.size:
        raise BadSampleError(
            f"mask holds {wrong[0]} at {counts[wrong[0]]} pixels, which is no class id and not {IGNORE_INDEX}"
        )
    return lookup.astype(np.uint8)[raw]


def _from_colors(image: Image.Image, colors: Mapping[int, int]) -> NDArray[np.uint8]:
    if image.mode not in ("P", "L", "RGB", "RGBA"):
        raise BadSampleError(f"mask mode {image.mode}: expected 8 bits a channel")
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(np.int32), -1, 0)
    packed = red << 16 | green << 8 | blue
    known = np.array(sorted(colors))
    place = np.searchsorted(known, packed).clip(max=len(known) - 1)
    wrong = packed[known[place] != packed]
    if wrong.size:
        count = np.count_nonzero(wrong == wrong[0])
        raise BadSampleError(f"mask holds #{wrong[0]:06x} at {count} pixels, which --values does not name")
    return np.array([colors[int(key)] for key in known], np.uint8)[place]


def class_lookup(classes: int, label_ids: Mapping[int, int] | None = None) -> NDArray[np.int16]:
    """The class id of each byte a mask may hold.

    Args:
        classes: number of classes.
        label_ids: class id by raw value, where masks hold something else than class ids.

    Returns:
        [256]: a class id, 255, or -1 where the value is not allowed.
    """
    lookup = np.full(256, _INVALID, np.int16)
    lookup[IGNORE_INDEX] = IGNORE_INDEX
    for value, index in (label_ids or {index: index for index in range(classes)}).items():
        lookup[value] = index
    return lookup


def _open_mask(data: bytes) -> Image.Image:
    try:
        return open_image(data, ("PNG",))
    except DecodeError as error:
        raise BadSampleError(f"unreadable mask ({error})") from error
