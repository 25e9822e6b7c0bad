"""Encoded bytes to pixels, with Pillow: it raises on damaged files where other decoders end the process.

The header is read first: it tells the size, and with that how much of the image is needed and at which resolution.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

MAX_PIXELS = 64_000_000
"""Larger images are refused before their pixels are decoded."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_EXIF_ORIENTATION, _TIFF_BITS = 0x0112, 258
_TURNED = "orientation"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What each EXIF orientation asks for."""
_BACK = {**TURNS, 6: TURNS[8], 8: TURNS[6]}
_PNG_BITS = 24
"""Where a PNG file has its bits a channel."""
BANDS_KEY = "u2pl-bands"
"""The note in a PNG of several bands, which lie one below the other: how many there are."""


# Pillow's own limit is higher and only warns; `catch_warnings` would change the filters of all threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DecodeError(ValueError):
    """The bytes are no image that can be used; the message says why."""


def decode_image(data: bytes | memoryview) -> np.ndarray:
    """An image file as RGB, or with all its bands if `encode_bands` made it.

    Returns:
        uint8 [H,W,3] or [H,W,B].

    Raises:
        DecodeError: damaged, too large, of more than 8 bits a channel, or of a format that is not in `FORMATS`.
    """
    return decode_part(read_header(data))


def decode_mask(data: bytes | memoryview) -> np.ndarray:
    """A single-channel PNG as class ids; a palette is never applied.

    Returns:
        uint8 [H,W].

    Raises:
        DecodeError: damaged, too large, or not of mode L or P.
    """
    image = open_image(data, ("PNG",))
    if image.mode not in ("L", "P"):
        raise DecodeError(f"mask of mode {image.mode}, expected L or P")
    return np.asarray(image)


def open_image(data: bytes | memoryview, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decodes whole, with any number of bits a channel.

    Raises:
        DecodeError: damaged, too large, or not of `formats`.
    """
    image = read_header(data, formats, bits=64)
    turn = orientation(image)
    with _translated():
        image.load()
        if image.format != "TIFF" or turn == 1:
            return image
        stored = image.transpose(_BACK[turn])  # Pillow turns these, and only these, as it loads them
        stored.format, stored.info = image.format, {**image.info, _TURNED: turn}
        stored.tag_v2 = image.tag_v2  # type: ignore[attr-defined]
        return stored


def read_header(data: bytes | memoryview, formats: tuple[str, ...] = FORMATS, bits: int = 8) -> Image.Image:
    """Opens an image: its size and mode are known, its pixels not yet decoded.

    Raises:
        DecodeError: empty, too large, not of `formats`, or of more than `bits` a channel.
    """
    if not data:
        raise DecodeError("no bytes: its file is empty or has vanished")
    with _translated(formats):
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except Image.UnidentifiedImageError as error:
            if "TIFF" in formats and bytes(data[:4]) in (b"II*\0", b"MM\0*"):
                raise DecodeError(
                    "a TIFF of a kind that is not read: write 8 bits in RGB or grey, or take its bands with --bands"
                ) from error
            raise
    if image.width * image.height > MAX_PIXELS:
        raise DecodeError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
    with _translated():
        found = bits_per_channel(image, data)
    if found > bits:
        raise DecodeError(f"{found} bits a channel, expected {bits}")
    return image


def bits_per_channel(image: Image.Image, data: bytes | memoryview) -> int:
    """What the file's header says; Pillow's mode does not tell 16-bit colour and 1- to 4-bit grey from 8 bits.

    Args:
        image: opened from `data`.
        data: the file.
    """
    if image.format == "PNG":
        return data[_PNG_BITS]
    if image.format == "TIFF":
        return max(image.tag_v2.get(_TIFF_BITS, (1,)))  # type: ignore[attr-defined]
    return 8


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where none is noted or the note is damaged."""
    try:
        found = image.info.get(_TURNED) or image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Pillow raises almost anything on a damaged note, without which the pixels are as good
        return 1
    return found if found in range(1, 9) else 1


def notes_rotation(image: Image.Image) -> bool:
    """Whether the file notes a rotation that decoded pixels do not follow: Pillow turns TIFF files, and only these."""
    return image.format != "TIFF" and orientation(image) != 1


def reduce(image: Image.Image, factor: int) -> int:
    """Has a JPEG decoded at 1/factor of its size, which takes a fraction of the time.

    Args:
        image: from `read_header`, not decoded yet.
        factor: 1, 2, 4 or 8.

    Returns:
        The factor that decoding will use: 1 for other formats. Pixel j of the smaller image covers the pixels
        j * factor to (j + 1) * factor - 1; the last one may cover fewer.
    """
    width, height = image.size
    wanted = (-(-width // factor), -(-height // factor))
    if factor > 1:
        image.draft(None, (max(1, width // factor), max(1, height // factor)))  # type: ignore[arg-type]
    return factor if image.size == wanted else 1


def size_of(image: Image.Image) -> tuple[int, int]:
    """Height and width of an image from `read_header`, of each of its bands."""
    return image.height // (bands_of(image) or 1), image.width


def bands_of(image: Image.Image) -> int:
    """How many bands `encode_bands` wrote into an image; 0: it did not make it."""
    noted = str(image.info.get(BANDS_KEY, "")) if image.format == "PNG" and image.mode == "L" else ""
    bands = int(noted) if noted.isascii() and noted.isdigit() else 0
    return bands if bands and image.height % bands == 0 else 0


def decode_part(image: Image.Image, part: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """The pixels of an opened image.

    Args:
        image: from `read_header`.
        part: top, left, height, width of what is wanted; None: everything.

    Returns:
        uint8 [height,width,3], or [height,width,B] of an image from `encode_bands`; writable.

    Raises:
        DecodeError: damaged, or of more than 8 bits a channel.
    """
    with _translated():
        if bands := bands_of(image):
            top, left, height, width = part or (0, 0, *size_of(image))
            pixels = np.asarray(image).reshape(bands, *size_of(image))
            return np.ascontiguousarray(pixels[:, top : top + height, left : left + width].transpose(1, 2, 0))
        image = _rgb(image)
        if part and part != (0, 0, image.height, image.width):
            top, left, height, width = part
            image = image.crop((left, top, left + width, top + height))
        return np.array(image)  # a copy: torch wants writable memory


def decode_reduced(
    image: Image.Image, part: tuple[int, int, int, int], factor: int, size: tuple[int, int]
) -> np.ndarray:
    """A part of an image for which `reduce` gave `factor`, resized.

    Args:
        image: from `read_header`.
        part: top, left, height, width in pixels of the stored image; between those of the smaller one, so that Pillow
            resizes, which takes fractions.
        factor: from `reduce`.
        size: height and width of the result; antialiased bilinear.

    Returns:
        uint8 [*size,3], writable.

    Raises:
        DecodeError: as `decode_part`.
    """
    top, left, height, width = part
    box = (left / factor, top / factor, (left + width) / factor, (top + height) / factor)
    with _translated():
        return np.array(_rgb(image).resize((size[1], size[0]), Image.Resampling.BILINEAR, box))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise DecodeError(f"mode {image.mode}, expected 8 bits a channel")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def _translated(formats: tuple[str, ...] = FORMATS) -> Iterator[None]:
    """Pillow raises almost anything on damaged files, even SyntaxError: all of it is a `DecodeError`."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        raise DecodeError(f"not a {' or '.join(filter(None, (', '.join(formats[:-1]), formats[-1])))}") from error
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(str(error) or type(error).__name__) from error


def shown(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What a picture shows of an image, uint8 [H,W,B] to [H,W,3]: its first three bands, or the first one as grey."""
    return pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, :1].repeat(3, 2)


def encode_bands(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 [H,W,B]: grey, the bands one below the other; `decode_image` gives them back."""
    height, width, bands = pixels.shape
    note = PngInfo()
    note.add_text(BANDS_KEY, str(bands))
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(2, 0, 1).reshape(bands * height, width)).save(buffer, "PNG", pnginfo=note)
    return buffer.getvalue()


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of `pixels`, [H,W] grey or [H,W,3] RGB."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
