"""Checks of single image files, and the form in which a dataset keeps them.

They come from outside, so nothing is taken for granted: the file's own header says what it holds. What has one meaning
is converted without loss, and told; what has several is refused with the remedy.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets.images import (
    MAX_PIXELS,
    TURNS,
    DecodeError,
    bits_per_channel,
    decode_image,
    encode_bands,
    encode_png,
    open_image,
    orientation,
)
from pipeline.datasets.raw.bands import Bands, read_bands
from pipeline.errors import UserError

Size = tuple[int, int]
"""Height and width in pixels."""


class BadSampleError(ValueError):
    """A file that cannot become part of a dataset; the message says why."""


@dataclass(frozen=True)
class PhotoRules:
    """What the user says about images that can be read in two ways."""

    exif: Literal["auto", "apply", "ignore"] = "auto"
    """Rotations that a camera noted in the file: turn the pixels, or leave them. auto: turn them where the mask only
    fits then."""
    high_byte: bool = False
    """Keep the upper eight bits of images with 16 bits a channel; else they are refused."""
    bands: Bands | None = None
    """Take these bands of each image; None: images are RGB or grey."""


class Photo(NamedTuple):
    """An image as it is kept."""

    data: bytes
    """A JPEG or PNG file; the file as it came wherever that will do."""
    size: Size
    """Of its pixels, as training decodes them."""
    notes: tuple[str, ...]
    """What was done to it, or is odd about it, to be counted and told."""
    moments: tuple[tuple[int, int], ...] = ()
    """Of each chosen band: the sum of its bytes, and that of their squares; empty of RGB."""


def check_image(data: bytes) -> Size:
    """Decodes an image once to see that training can.

    Args:
        data: content of a JPEG, PNG, WebP, BMP or TIFF file.

    Returns:
        Its size as stored; an EXIF rotation is not applied.

    Raises:
        BadSampleError: unreadable, too large, or of more than 8 bits a channel.
    """
    try:
        height, width, _ = decode_image(data).shape
    except DecodeError as error:
        raise BadSampleError(f"unreadable image ({error})") from error
    return height, width


def canonical_photo(data: bytes, mask: Size | None, rules: PhotoRules) -> Photo:
    """Checks an image and brings it into a form that training reads.

    Args:
        data: content of a JPEG, PNG, WebP, BMP or TIFF file.
        mask: size of its mask; None: unlabeled.
        rules: what to do where the file leaves a choice.

    Raises:
        BadSampleError: unreadable, too large, of more bits a channel than the rules take, or of real numbers.
        UserError: bands are to be read, and what reads them is not installed.
    """
    try:
        return _canonical(data, mask, rules) if rules.bands is None else _banded(data, rules.bands)
    except DecodeError as error:
        raise BadSampleError(f"unreadable image ({error})") from error
    except (BadSampleError, UserError):
        raise
    except Exception as error:  # Pillow raises almost anything where a file contradicts itself
        raise BadSampleError(f"unreadable image ({str(error) or type(error).__name__})") from error


def _canonical(data: bytes, mask: Size | None, rules: PhotoRules) -> Photo:
    image = open_image(data)
    form = "JPEG" if image.format == "MPO" else image.format  # phones put a second, small picture behind the first
    bits, turn = bits_per_channel(image, data), orientation(image)
    notes: list[str] = []
    if image.mode.startswith("F"):
        raise BadSampleError("pixels are real numbers: --bands 0 --range LOW..HIGH takes a range of them")
    if bits > 16 or image.mode == "I":
        raise BadSampleError("pixels of 32 bits or with a sign: --bands 0 --range LOW..HIGH takes a range of them")
    if bits > 8 and not rules.high_byte:
        raise BadSampleError(
            f"{bits} bits a channel: --high_byte keeps the upper eight; where these are dark (12-bit cameras), "
            "--bands 0 --range 0..4095 takes a range of values (of colours --bands 0..2)"
        )
    if form != "JPEG" and getattr(image, "n_frames", 1) > 1:
        notes.append("images that hold several pictures, of which the first is taken")
    bands = image.getbands()
    if bands[-1] in ("A", "X") and image.getchannel(len(bands) - 1).getextrema() != (255, 255):
        notes.append("images with a further band (transparency, or infrared), which is dropped")
    turned = turn != 1 and _applies(rules, turn, mask, (image.height, image.width))
    if turned:
        image = image.transpose(TURNS[turn])
        notes.append("images turned as their EXIF rotation says")
    elif turn != 1:
        which = "without a mask" if mask is None else "with a mask"
        notes.append(f"images {which} and an EXIF rotation that is not applied (--exif apply turns them)")
    if bits > 8:
        notes.append(f"images of {bits} bits a channel, of which the upper eight are kept")
    elif form not in ("JPEG", "PNG"):
        notes.append(f"{form} images kept as PNG, without loss")
    if turned or bits > 8 or form not in ("JPEG", "PNG"):
        data = encode_png(_eight_bits(image, bits))
    return Photo(data, (image.height, image.width), tuple(notes))


def _banded(data: bytes, bands: Bands) -> Photo:
    pixels = read_bands(data, bands)
    if pixels.size > MAX_PIXELS:
        height, width, count = pixels.shape
        raise BadSampleError(f"{count} bands of {width}x{height}: more than {MAX_PIXELS:,} values; cut it into tiles")
    values = pixels.reshape(-1, pixels.shape[2]).astype(np.int64)
    moments = zip(values.sum(0).tolist(), (values**2).sum(0).tolist(), strict=True)
    return Photo(encode_bands(pixels), pixels.shape[:2], (), tuple(moments))


def _applies(rules: PhotoRules, turn: int, mask: Size | None, stored: Size) -> bool:
    """Whether to turn the pixels of an image whose EXIF orientation is `turn` (2 to 8; from 5 on height is width)."""
    if rules.exif != "auto":
        return rules.exif == "apply"
    upright = stored[::-1] if turn >= 5 else stored
    return mask is not None and mask != stored and mask == upright


def _eight_bits(image: Image.Image, bits: int) -> NDArray[np.uint8]:
    """The pixels, [H,W] or [H,W,3]. Pillow keeps the upper bytes of 16-bit colour by itself, not those of grey."""
    if image.mode.startswith("I"):
        return (np.asarray(image).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
