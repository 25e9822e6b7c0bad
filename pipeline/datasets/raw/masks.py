"""Checks of single mask files, and the one form that everything downstream reads."""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets.images import DecodeError, bits_per_channel, encode_png, open_image
from pipeline.datasets.prepared.dataset import IGNORE_INDEX
from pipeline.datasets.raw.photos import BadSampleError, Size
from pipeline.errors import UserError

MASK_FORMATS = ("PNG", "TIFF")
_LOSSY = ("jpeg", "tiff_jpeg", "webp", "jpeg2000")
_VOID_COLOR = 0xE0E0C0
"""Of VOC's palette, for pixels that are ignored."""
_INVALID = -1
_MAT_MAGIC = b"MATLAB 5.0"
_SHOWN = 12
"""So many values a message lists."""


class UnknownValuesError(BadSampleError):
    """A mask with values that are no class."""

    def __init__(self, message: str, values: Sequence[str]) -> None:
        super().__init__(message)
        self.values = tuple(values)
        """All of them, as --values writes them."""


class Mask(NamedTuple):
    """A mask as it is kept."""

    data: bytes
    """A PNG file of mode L: class ids and 255."""
    pixels: NDArray[np.int64]
    """[256], how many of its pixels hold each value."""
    palette: Mapping[int, int]
    """0xRRGGBB by class id, of the classes in it, as the file's own palette has them; empty without one."""


def mask_size(data: bytes) -> Size | None:
    """Height and width that a mask's header says; None: it cannot be read."""
    try:
        image = open_image(data, MASK_FORMATS)
    except DecodeError:
        return None
    return image.height, image.width


def canonical_mask(data: bytes, size: Size, lookup: NDArray[np.int16], colors: Mapping[int, int] | None = None) -> Mask:
    """Checks a mask and stores it in the one form that everything downstream reads.

    Args:
        data: content of a PNG or TIFF file, or of one of SBD's `.mat` files. Values are palette indices; grey values as
            the file stores them, of 1 to 8 bits, or of 16 where they are below 256; or three equal channels.
        size: height and width of its image.
        lookup: [256], see `class_lookup`.
        colors: class id (or 255) by 0xRRGGBB; if there are any, a picture's colours are the values.

    Raises:
        BadSampleError: unreadable, another size, other channels.
        UnknownValuesError: a value that is no class.
        UserError: a `.mat` file, but scipy is not installed.
    """
    palette: Mapping[int, int] = {}
    if data.startswith(_MAT_MAGIC):
        ids = _from_values(_mat_values(data), lookup)
    else:
        image = _open_mask(data)
        if colors:
            ids = _from_colors(image, bits_per_channel(image, data), colors)
        else:
            raw = _values(image, data)
            ids = _from_values(raw, lookup)
            palette = _palette(image, raw, lookup)
    if ids.shape != size:
        raise BadSampleError(f"mask is {ids.shape[1]}x{ids.shape[0]}, its image {size[1]}x{size[0]}")
    return Mask(encode_png(ids), np.bincount(ids.ravel(), minlength=256), palette)


def check_palette(palette: Mapping[int, int], known: Sequence[tuple[int, int, int]]) -> None:
    """Compares a mask's palette with the one that the dataset is known to have.

    Only a colour that belongs to another class contradicts: PNG optimisers renumber palettes and keep the colours.

    Raises:
        BadSampleError: it contradicts, so that its indices are no class ids.
    """
    class_of = {red << 16 | green << 8 | blue: index for index, (red, green, blue) in enumerate(known)}
    class_of[_VOID_COLOR] = IGNORE_INDEX
    for index, color in palette.items():
        if class_of.get(color, index) != index and class_of.get(palette.get(class_of[color], -1)) != class_of[color]:
            table = ",".join(f"#{each:06x}={number}" for each, number in class_of.items())
            raise BadSampleError(
                f"mask's palette gives index {index} the colour #{color:06x} of class {class_of[color]}: a program has "
                f"renumbered it; take the colours instead: --values '{table}'"
            )


def _values(image: Image.Image, data: bytes) -> NDArray[np.uint8]:
    """What the file stores at each pixel. Pillow stretches grey of 1, 2 and 4 bits to 0..255; this takes it back."""
    bits = bits_per_channel(image, data)
    if image.mode == "P":
        return np.asarray(image)  # the palette indices; convert("L") would give grey values
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8)
    if image.mode == "L":
        return np.asarray(image) // np.uint8(255 // (2**bits - 1))
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 255:
            raise BadSampleError(
                f"mask holds values from {values.min()} to {values.max()}: class ids are 0 to 254, and 255 is ignored"
            )
        return values.astype(np.uint8)
    if bits > 8:
        raise BadSampleError(f"mask of {bits} bits a channel: expected class ids in one channel, or colours of 8 bits")
    if image.mode in ("RGB", "RGBA", "LA"):
        bands = np.moveaxis(np.asarray(image), -1, 0)
        colors = bands[: 1 if image.mode == "LA" else 3]
        if (colors == colors[0]).all():
            return np.ascontiguousarray(colors[0])
        found = [f"#{color:06x}" for color in np.unique(_packed(image))]
        raise UnknownValuesError(f"mask is a colour picture; say what its colours are: {_table(found)}", found)
    raise BadSampleError(f"mask mode {image.mode}: expected class ids in one channel (grey or palette PNG or TIFF)")


def _table(found: Sequence[str]) -> str:
    """The --values that would name them, for the user to fill in."""
    more = ",..." if len(found) > _SHOWN else ""
    return "--values '" + ",".join(f"{value}=ID" for value in found[:_SHOWN]) + f"{more}'"


def _palette(image: Image.Image, raw: NDArray[np.uint8], lookup: NDArray[np.int16]) -> dict[int, int]:
    if image.mode != "P":
        return {}
    flat = image.getpalette("RGB") or []
    found = {}
    for value in np.flatnonzero(np.bincount(raw.ravel(), minlength=256)).tolist():
        if lookup[value] != IGNORE_INDEX and 3 * value + 3 <= len(flat):
            red, green, blue = flat[3 * value : 3 * value + 3]
            found[int(lookup[value])] = red << 16 | green << 8 | blue
    return found


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
        raise UnknownValuesError(
            f"mask holds {wrong[0]} at {counts[wrong[0]]} pixels, which is no class id and not {IGNORE_INDEX}",
            [str(value) for value in wrong],
        )
    return lookup.astype(np.uint8)[raw]


def _packed(image: Image.Image) -> NDArray[np.int32]:
    """0xRRGGBB of each pixel."""
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def _from_colors(image: Image.Image, bits: int, colors: Mapping[int, int]) -> NDArray[np.uint8]:
    if bits > 8 or image.mode not in ("P", "L", "1", "RGB", "RGBA"):
        raise BadSampleError(f"mask mode {image.mode} of {bits} bits a channel: expected colours of 8 bits")
    packed = _packed(image)
    known = np.array(sorted(colors))
    place = np.searchsorted(known, packed).clip(max=len(known) - 1)
    wrong = packed[known[place] != packed]
    if wrong.size:
        count = np.count_nonzero(wrong == wrong[0])
        raise UnknownValuesError(
            f"mask holds #{wrong[0]:06x} at {count} pixels, to which no class is given"
            + ("; it holds ids and no colours: name the classes alone" if image.mode == "L" else ""),
            [f"#{color:06x}" for color in np.unique(wrong)],
        )
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
        image = open_image(data, MASK_FORMATS)
    except DecodeError as error:
        raise BadSampleError(f"unreadable mask ({error})") from error
    if getattr(image, "n_frames", 1) > 1:
        raise BadSampleError("mask holds several pictures: write the one that counts as PNG")
    if image.info.get("compression") in _LOSSY:
        raise BadSampleError("mask is a TIFF with the compression of a photo, which changes class ids; write it as PNG")
    if image.format == "TIFF" and image.mode in ("1", "L") and image.tag_v2.get(262) == 0:  # type: ignore[attr-defined]
        raise BadSampleError("mask is a TIFF in which 0 is white: readers disagree about its values; write it as PNG")
    return image
