"""What files of people's own hold, and what becomes of it: kept, converted and told, or refused with the remedy."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.datasets.images import decode_image
from pipeline.datasets.raw import masks
from pipeline.datasets.raw.masks import UnknownValuesError, canonical_mask, class_lookup
from pipeline.datasets.raw.photos import BadSampleError, Photo, PhotoRules, canonical_photo
from pipeline.datasets.specs import voc_palette

SIZE = (24, 32)
UPRIGHT = (32, 24)
LOOKUP = class_lookup(3)
RULES = PhotoRules()


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def deep_png(values: np.ndarray) -> bytes:
    """A PNG with 16 bits a channel, which Pillow does not write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixels(channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (*SIZE, channels), np.uint8).squeeze()


def turned(orientation: int) -> bytes:
    image = Image.fromarray(pixels())
    exif = image.getexif()
    exif[0x0112] = orientation
    return encoded(image, "PNG", exif=exif)


# ---- photos -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_common_files_stay_as_they_are(form):
    data = encoded(Image.fromarray(pixels()), form)
    assert canonical_photo(data, None, RULES) == Photo(data, SIZE, ())


@pytest.mark.parametrize(("form", "options"), [("TIFF", {}), ("WEBP", {"lossless": True}), ("BMP", {})])
def test_other_files_become_png_without_loss_and_it_is_told(form, options):
    photo = canonical_photo(encoded(Image.fromarray(pixels()), form, **options), None, RULES)
    assert Image.open(io.BytesIO(photo.data)).format == "PNG"
    assert np.array_equal(decode_image(photo.data), pixels())
    assert photo.notes == (f"{form} images kept as PNG, without loss",)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_refused_or_cut_as_the_user_says(channels):
    values = (pixels(channels).reshape(*SIZE, channels).astype(np.uint16) << 8) + 77
    files = [deep_png(values)]
    if channels == 1:
        files.append(encoded(Image.fromarray(values[..., 0]), "TIFF"))
    for data in files:
        with pytest.raises(BadSampleError, match="16 bits a channel: --high_byte keeps the upper eight; where"):
            canonical_photo(data, None, RULES)
        photo = canonical_photo(data, None, PhotoRules(high_byte=True))
        assert np.array_equal(decode_image(photo.data)[..., :channels], values >> 8)
        assert photo.notes == ("images of 16 bits a channel, of which the upper eight are kept",)


def test_a_further_band_is_told_unless_it_says_nothing():
    solid, clear = np.dstack([pixels(), np.full(SIZE, 255, np.uint8)]), pixels(4)
    assert canonical_photo(encoded(Image.fromarray(solid), "PNG"), None, RULES).notes == ()
    photo = canonical_photo(encoded(Image.fromarray(clear), "PNG"), None, RULES)
    assert photo.notes == ("images with a further band (transparency, or infrared), which is dropped",)
    with pytest.raises(BadSampleError, match="real numbers"):
        canonical_photo(encoded(Image.fromarray(pixels(1).astype(np.float32)), "TIFF"), None, RULES)


def test_an_image_is_turned_where_its_mask_only_fits_then():
    upright = UPRIGHT
    photo = canonical_photo(turned(6), upright, RULES)
    assert (photo.size, photo.notes) == (upright, ("images turned as their EXIF rotation says",))
    assert np.array_equal(decode_image(photo.data), np.rot90(pixels(), -1))
    assert canonical_photo(turned(6), SIZE, RULES).size == SIZE
    alone = canonical_photo(turned(6), None, RULES)
    assert (alone.data, alone.size) == (turned(6), SIZE)
    assert alone.notes == ("images without a mask and an EXIF rotation that is not applied (--exif apply turns them)",)
    assert canonical_photo(turned(1), upright, RULES).size == SIZE


def test_what_no_size_tells_is_said_by_the_user():
    half = canonical_photo(turned(3), SIZE, RULES)
    assert half.data == turned(3)
    assert half.notes == ("images with a mask and an EXIF rotation that is not applied (--exif apply turns them)",)
    applied = canonical_photo(turned(3), SIZE, PhotoRules("apply"))
    assert np.array_equal(decode_image(applied.data), pixels()[::-1, ::-1])
    assert canonical_photo(turned(6), UPRIGHT, PhotoRules("ignore")).size == SIZE
    assert canonical_photo(turned(6), None, PhotoRules("apply")).size == UPRIGHT


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format_is_the_files_own(orientation):
    """Pillow turns TIFF files by itself, and only these."""
    tiff = encoded(Image.fromarray(pixels()), "TIFF", tiffinfo={274: orientation})
    for data in (tiff, turned(orientation)):
        ignored = canonical_photo(data, SIZE, PhotoRules("ignore"))
        assert np.array_equal(decode_image(ignored.data), pixels())
        applied = canonical_photo(data, SIZE, PhotoRules("apply"))
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(turned(orientation)))))
        assert np.array_equal(decode_image(applied.data), expected)
    mask = encoded(Image.fromarray(ids()), "TIFF", tiffinfo={274: orientation})
    assert np.array_equal(stored(mask), ids())


def test_files_that_contradict_themselves_are_bad_samples():
    data = bytearray(encoded(Image.fromarray(pixels()), "TIFF"))
    data[-4:] = b"\xff\xff\xff\x7f"  # the next picture lies beyond the end
    for at in range(4, len(data), 97):
        spoiled = bytes([*data[:at], data[at] ^ 0x55, *data[at + 1 :]])
        with contextlib.suppress(BadSampleError):
            canonical_photo(spoiled, None, RULES)


def test_what_no_rule_makes_sense_of_is_refused():
    for image in (Image.fromarray(pixels(1).astype(np.int32)), Image.fromarray(pixels(1).astype(np.float32))):
        with pytest.raises(BadSampleError, match="takes a range of them"):
            canonical_photo(encoded(image, "TIFF"), None, PhotoRules(high_byte=True))


# ---- masks ------------------------------------------------------------------------------------------------------


def ids() -> np.ndarray:
    return (np.arange(24 * 32) % 3).astype(np.uint8).reshape(SIZE)


def stored(data: bytes, **options: object) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(canonical_mask(data, SIZE, LOOKUP, **options).data)))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_is_what_the_file_stores(bits):
    """Pillow stretches it: 1 becomes 85 or 17."""
    assert np.array_equal(stored(encoded(Image.fromarray(ids()), "PNG", bits=bits)), ids())


def test_other_ways_to_write_the_same_ids():
    two = (ids() > 0).astype(np.uint8)
    assert np.array_equal(stored(encoded(Image.fromarray(two.astype(bool)), "PNG")), two)
    equal, solid = [ids()] * 3, np.full(SIZE, 255, np.uint8)
    for pixels_of in (np.dstack(equal), np.dstack([*equal, solid]), ids().astype(np.uint16)):
        assert np.array_equal(stored(encoded(Image.fromarray(pixels_of), "PNG")), ids())
    for image in (Image.fromarray(ids()), Image.fromarray(ids().astype(np.uint16)), Image.fromarray(two.astype(bool))):
        assert stored(encoded(image, "TIFF")).max() == np.asarray(image).max()


def test_masks_that_lose_their_ids_are_refused():
    """Compression of photos changes ids; Pillow keeps the upper byte of 16-bit colour."""
    with pytest.raises(BadSampleError, match="compression of a photo, which changes class ids"):
        stored(encoded(Image.fromarray(ids()), "TIFF", compression="jpeg"))
    pages = [Image.fromarray(ids()), Image.fromarray(ids() + 1)]
    with pytest.raises(BadSampleError, match="mask holds several pictures"):
        stored(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    for options in ({}, {"colors": {0: 0}}):
        with pytest.raises(BadSampleError, match="16 bits a channel"):
            stored(deep_png(np.dstack([ids()] * 3).astype(np.uint16)), **options)
    with pytest.raises(UnknownValuesError, match="holds ids and no colours: name the classes alone"):
        stored(encoded(Image.fromarray(ids()), "PNG"), colors={0x800000: 1})


def test_pixels_are_counted():
    mask = ids()
    mask[0, :5] = 255
    found = canonical_mask(encoded(Image.fromarray(mask), "PNG"), SIZE, LOOKUP)
    assert found.pixels.tolist() == np.bincount(mask.ravel(), minlength=256).tolist()


def test_all_values_without_a_class_are_named():
    mask = ids()
    mask[0, :4] = (7, 9, 9, 200)
    with pytest.raises(UnknownValuesError, match="holds 7 at 1 pixels") as error:
        stored(encoded(Image.fromarray(mask), "PNG"))
    assert error.value.values == ("7", "9", "200")
    painted = np.zeros((*SIZE, 3), np.uint8)
    painted[0, 0], painted[1, 1] = (255, 0, 0), (1, 2, 3)
    with pytest.raises(UnknownValuesError, match=r"--values '#000000=ID,#010203=ID,#ff0000=ID'") as error:
        stored(encoded(Image.fromarray(painted), "PNG"))
    assert error.value.values == ("#000000", "#010203", "#ff0000")
    with pytest.raises(UnknownValuesError, match="holds #") as error:
        stored(encoded(Image.fromarray(painted), "PNG"), colors={0: 0})
    assert error.value.values == ("#010203", "#ff0000")


def test_a_palette_that_contradicts_is_refused():
    known = voc_palette(3)

    def palette(*order: int) -> dict[int, int]:
        image = Image.frombytes("P", (32, 24), ids().tobytes())
        image.putpalette([channel for index in order for channel in voc_palette(4)[index]])
        return dict(canonical_mask(encoded(image, "PNG"), SIZE, LOOKUP).palette)

    masks.check_palette(palette(0, 1, 2), known)
    masks.check_palette({0: 0x010101, 1: 0x800000, 2: 0x008000}, known)  # a tone of its own contradicts nothing
    with pytest.raises(BadSampleError, match=r"index 0 the colour #800000 of class 1: .* --values '#000000=0,"):
        masks.check_palette(palette(1, 0, 2), known)
    with pytest.raises(BadSampleError, match="index 1 the colour #e0e0c0 of class 255"):
        masks.check_palette({0: 0, 1: 0xE0E0C0}, known)  # unused entries were dropped, and void moved up
    with pytest.raises(BadSampleError, match="index 1"):
        masks.check_palette(palette(3, 0, 2), known)
