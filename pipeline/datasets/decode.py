"""Encoded bytes to pixels, with Pillow: it raises on damaged files where other decoders end the process."""

import io
import warnings

import numpy as np
from PIL import Image

MAX_PIXELS = 64_000_000
"""Larger images are refused before their pixels are decoded."""


class DecodeError(ValueError):
    """The bytes are no image that can be used; the message says why."""


def decode_image(data: bytes | memoryview) -> np.ndarray:
    """A JPEG or PNG as RGB.

    Returns:
        uint8 [H,W,3].

    Raises:
        DecodeError: damaged, too large, or another format.
    """
    return np.array(open_image(data, ("JPEG", "PNG")).convert("RGB"))  # a copy: torch wants writable memory


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


def open_image(data: bytes | memoryview, formats: tuple[str, ...]) -> Image.Image:
    """Decodes whole, within limits.

    Raises:
        DecodeError: damaged, too large, or not of `formats`.
    """
    if not len(data):
        raise DecodeError("no bytes: it was left out by prepare, or its file has vanished")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=formats)
            if image.width * image.height > MAX_PIXELS:
                raise DecodeError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()
            return image
    except DecodeError:
        raise
    except Image.UnidentifiedImageError as error:
        raise DecodeError("not a " + " or ".join(formats)) from error
    except Exception as error:  # Pillow raises almost anything on damaged files, even SyntaxError
        raise DecodeError(str(error) or type(error).__name__) from error
