"""Checks of single image and mask files; they come from outside, so nothing is taken for granted."""

import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets.decode import DecodeError, decode_image, open_image
from pipeline.datasets.format import IGNORE_INDEX

_INVALID = -1


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


def canonical_mask(data: bytes, size: tuple[int, int], lookup: NDArray[np.int16]) -> bytes:
    """Checks a mask and stores it in the one form that everything downstream reads.

    Args:
        data: content of a PNG file with 8 bits a pixel, grey or palette; palette indices are the values.
        size: height and width of its image.
        lookup: [256], see `class_lookup`.

    Returns:
        A PNG file of mode L: class ids and 255.

    Raises:
        BadSampleError: unreadable, another size, other bit depth or channels, or a value that is no class.
    """
    try:
        image = open_image(data, ("PNG",))
    except DecodeError as error:
        raise BadSampleError(f"unreadable mask ({error})") from error
    if image.mode not in ("P", "L"):
        raise BadSampleError(f"mask mode {image.mode}: expected one channel of 8-bit class ids (grey or palette PNG)")
    if (image.height, image.width) != size:
        raise BadSampleError(f"mask is {image.width}x{image.height}, its image {size[1]}x{size[0]}")
    raw = np.asarray(image)  # of mode P these are the palette indices; convert("L") would give grey values
    counts = np.bincount(raw.ravel(), minlength=256)
    wrong = np.flatnonzero((counts > 0) & (lookup == _INVALID))
    if wrong.size:
        raise BadSampleError(
            f"mask holds {wrong[0]} at {counts[wrong[0]]} pixels, which is no class id and not {IGNORE_INDEX}"
        )
    return encode_png(lookup.astype(np.uint8)[raw])


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


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of `pixels`, [H,W] grey or [H,W,3] RGB."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
