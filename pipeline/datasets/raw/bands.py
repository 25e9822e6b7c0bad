"""Images that are no 8-bit RGB: chosen bands of TIFF and PNG files, brought to 8 bits by stated ranges.

A range is what the user says, such as 0..10000 of a satellite's reflectances, and not what a file happens to hold: the
same value means the same in all images. 8 bits are kept because ingest and views are bytes; a step is 1/255 of a range.
"""

import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.images import MAX_PIXELS, DecodeError
from pipeline.errors import UserError

MOST_BANDS = 255
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG"


@dataclass(frozen=True)
class Bands:
    """Which bands of a file make an image, and how their values become bytes."""

    chosen: tuple[int, ...]
    """Numbers in the file, from 0, in the order that the network gets them."""
    ranges: tuple[tuple[float, float], ...]
    """Of each chosen band: the value that becomes 0, and the one that becomes 255; what is beyond is cut off."""


def parse_bands(bands: str, ranges: str) -> Bands:
    """Reads `0..11` or `3,2,1`, and `0..10000` for all bands or one range for each, separated by commas.

    Raises:
        UserError: neither.
    """
    chosen: list[int] = []
    for part in bands.split(","):
        low, dots, high = part.partition("..")
        ends = [low, high] if dots else [low, low]
        if not all(end.isascii() and end.isdigit() for end in ends) or int(ends[1]) < int(ends[0]):
            raise UserError(f"--bands {bands}: expected numbers from 0 on, such as 0..11 or 3,2,1,7")
        chosen += range(int(ends[0]), int(ends[1]) + 1)
    if len(chosen) > MOST_BANDS:
        raise UserError(f"--bands {bands}: at most {MOST_BANDS}")
    found = [_range(part, ranges) for part in ranges.split(",")]
    if len(found) not in (1, len(chosen)):
        raise UserError(f"--range {ranges}: {len(found)} ranges for {len(chosen)} bands; give one for all or for each")
    return Bands(tuple(chosen), tuple(found * len(chosen) if len(found) == 1 else found))


def _range(text: str, whole: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(".."))
    except ValueError:
        low, high = 0.0, 0.0
    if not np.isfinite([low, high]).all() or low >= high:
        raise UserError(f"--range {whole}: expected LOW..HIGH, such as 0..10000, for all bands or each, with commas")
    return low, high


def read_bands(data: bytes, bands: Bands) -> NDArray[np.uint8]:
    """The chosen bands of a file, scaled to bytes; values that are no number become 0.

    Args:
        data: content of a TIFF or PNG file of whole or real numbers of any size.
        bands: which, and their ranges.

    Returns:
        uint8 [H,W,B].

    Raises:
        DecodeError: damaged, too large, of another format, without one of the bands, or with several images in one.
        UserError: tifffile or imagecodecs are not installed.
    """
    values = _values(data)
    absent = [band for band in bands.chosen if band >= values.shape[2]]
    if absent:
        raise DecodeError(f"has {values.shape[2]} bands, from 0 on: no band {absent[0]}")
    out = np.empty((*values.shape[:2], len(bands.chosen)), np.uint8)
    for at, (band, (low, high)) in enumerate(zip(bands.chosen, bands.ranges, strict=True)):
        scaled = 255 * ((values[:, :, band].astype(np.float64) - low) / (high - low))
        out[:, :, at] = np.nan_to_num(scaled, nan=0.0).clip(0, 255).round()
    return out


def _values(data: bytes) -> NDArray[Any]:
    """All bands of a file, [H,W,bands], as stored."""
    try:
        import imagecodecs
        import tifffile
    except ImportError as error:
        raise UserError("--bands: not installed; pip install 'u2pl-ray[bands]'") from error
    logging.getLogger("tifffile").disabled = True  # what is wrong with a file is told once, in our words
    if not data.startswith((*_TIFF, _PNG)):
        raise DecodeError("not a TIFF or PNG, which --bands reads")
    try:
        if data.startswith(_PNG):
            found, axes = imagecodecs.png_decode(data), "YXS"
            axes = axes[: found.ndim]
        else:
            with tifffile.TiffFile(io.BytesIO(data)) as file:
                series = file.series[0]
                axes = series.axes
                sides = dict(zip(axes, series.shape, strict=True))
                if sides.get("Y", 1) * sides.get("X", 1) > MAX_PIXELS:
                    raise DecodeError(f"{sides['X']}x{sides['Y']} pixels, more than {MAX_PIXELS:,}")
                found = series.asarray()
                if found.shape != series.shape:
                    raise DecodeError("damaged: fewer values than it says")
    except DecodeError:
        raise
    except Exception as error:  # both raise almost anything on damaged files
        raise DecodeError(" ".join(str(error).split()) or type(error).__name__) from error
    others = [axis for axis in axes if axis not in "YX"]
    if len(others) > 1 or not {"Y", "X"} <= {*axes} or not np.issubdtype(found.dtype, np.number):
        raise DecodeError(f"holds {found.dtype} of shape {list(found.shape)}, axes {axes}: expected one image of bands")
    if np.iscomplexobj(found):
        raise DecodeError("holds complex numbers")
    return np.moveaxis(found, axes.index(others[0]), -1) if others else found[:, :, None]
