"""Chosen bands of files as other tools write them, and the bytes that become of their values."""

import contextlib
import io
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile

from pipeline.datasets.images import DecodeError, decode_image, decode_part, encode_bands, read_header, shown
from pipeline.datasets.raw.bands import Bands, parse_bands, read_bands
from pipeline.datasets.raw.photos import BadSampleError, PhotoRules, canonical_photo
from pipeline.errors import UserError
from tests.unit.datasets.conftest import Trees

DEEP = np.random.default_rng(0).integers(0, 10_001, (20, 30, 12)).astype(np.uint16)
"""[H,W,bands], as a satellite's reflectances."""
CHOSEN = Bands((3, 11, 0), ((0.0, 10_000.0), (0.0, 5_000.0), (2_000.0, 4_000.0)))


def tiff(values: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack", **options)
    return file.getvalue()


def expected(values: np.ndarray, bands: Bands) -> np.ndarray:
    """Value by value, by hand."""
    out = np.zeros((*values.shape[:2], len(bands.chosen)), np.uint8)
    for at, (band, (low, high)) in enumerate(zip(bands.chosen, bands.ranges, strict=True)):
        for place in np.ndindex(values.shape[:2]):
            share = (float(values[(*place, band)]) - low) / (high - low)
            out[(*place, at)] = round(255 * min(max(share, 0.0), 1.0))
    return out


@pytest.mark.parametrize(
    "data",
    [
        tiff(DEEP, planarconfig="contig"),
        tiff(DEEP, planarconfig="contig", compression="lzw"),
        tiff(DEEP, planarconfig="contig", compression="zlib", predictor=True, tile=(16, 16)),
        tiff(DEEP, planarconfig="contig", bigtiff=True, byteorder=">"),
        tiff(np.moveaxis(DEEP, 2, 0), planarconfig="separate"),
        tiff(np.moveaxis(DEEP, 2, 0)),
    ],
    ids=["pixel by pixel", "LZW", "deflate in tiles", "big-endian BigTIFF", "band by band", "a page each"],
)
def test_a_tiff_of_many_bands_however_it_is_laid(data):
    assert (read_bands(data, CHOSEN) == expected(DEEP, CHOSEN)).all()


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint32, np.float32, np.float64])
def test_whole_and_real_numbers_of_any_size(kind):
    values = (DEEP[:, :, :2] % 200).astype(kind)
    bands = Bands((0, 1), ((0.0, 199.0), (50.0, 150.0)))
    assert (read_bands(tiff(values, planarconfig="contig"), bands) == expected(values, bands)).all()


def test_what_is_no_number_becomes_0():
    values = np.array([[np.nan, np.inf, -np.inf, 5.0]], np.float32)
    assert read_bands(tiff(values), Bands((0,), ((0.0, 10.0),))).tolist() == [[[0], [255], [0], [128]]]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_of_16_bits(channels):
    values = DEEP[:, :, :channels]
    bands = Bands(tuple(range(channels)), ((0.0, 10_000.0),) * channels)
    data = bytes(imagecodecs.png_encode(np.ascontiguousarray(values.squeeze())))
    assert (read_bands(data, bands) == expected(values, bands)).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(DEEP[:, :, :4], planarconfig="contig"), "has 4 bands, from 0 on: no band 11"),
        (tiff(np.zeros((2, 5, 6, 7), np.uint16)), r"holds uint16 of shape \[2, 5, 6, 7\].*expected one image of bands"),
        (tiff(DEEP[:, :, 0].astype(np.complex64)), "holds complex numbers"),
        (Trees.image(), "not a TIFF or PNG"),
        (b"", "not a TIFF or PNG"),
        (tiff(DEEP, planarconfig="contig")[:900], "."),
        (b"II*\0" + bytes(60), "."),
        (imagecodecs.png_encode(DEEP[:, :, 0].copy())[:100], "."),
    ],
)
def test_files_that_will_not_do(data, message):
    with pytest.raises(DecodeError, match=message):
        read_bands(data, CHOSEN)


def test_damaged_files_are_decode_errors(rounds):
    """Bytes changed at random places: a result or a `DecodeError`, and nothing else."""
    for seed in rounds:
        rng = np.random.default_rng(seed)
        data = bytearray(tiff(DEEP[:8, :8], planarconfig="contig", compression="zlib" if seed % 2 else None))
        for place in rng.integers(0, min(len(data), 400), 4):
            data[place] = rng.integers(256)
        with contextlib.suppress(DecodeError):
            assert read_bands(bytes(data), CHOSEN).shape[2] == 3


@pytest.mark.parametrize(
    ("bands", "ranges", "found"),
    [
        ("0..3", "0..10000", Bands((0, 1, 2, 3), ((0.0, 10_000.0),) * 4)),
        ("7,1..2", "0..1,-1..1,0.5..2e3", Bands((7, 1, 2), ((0.0, 1.0), (-1.0, 1.0), (0.5, 2000.0)))),
        ("0", "0..4095", Bands((0,), ((0.0, 4095.0),))),
    ],
)
def test_what_flags_say(bands, ranges, found):
    assert parse_bands(bands, ranges) == found


@pytest.mark.parametrize(
    ("bands", "ranges", "message"),
    [
        ("all", "0..1", "--bands all: expected numbers"),
        ("3..1", "0..1", "--bands 3..1: expected numbers"),
        ("-1", "0..1", "--bands -1: expected numbers"),
        ("0..300", "0..1", "at most 255"),
        ("0..2", "0..1,0..2", "2 ranges for 3 bands"),
        ("0", "1..0", "--range 1..0: expected LOW..HIGH"),
        ("0", "0-1", "expected LOW..HIGH"),
        ("0", "0..inf", "expected LOW..HIGH"),
    ],
)
def test_flags_that_say_nothing(bands, ranges, message):
    with pytest.raises(UserError, match=message):
        parse_bands(bands, ranges)


# ---- as a dataset keeps them ------------------------------------------------------------------------------------


def test_a_dataset_keeps_all_bands_and_their_moments():
    photo = canonical_photo(tiff(DEEP, planarconfig="contig"), None, PhotoRules(bands=CHOSEN))
    pixels = expected(DEEP, CHOSEN)
    assert photo.size == (20, 30)
    assert (decode_image(photo.data) == pixels).all()
    part = decode_part(read_header(photo.data), (3, 5, 7, 11))
    assert (part == pixels[3:10, 5:16]).all()
    values = pixels.reshape(-1, 3).astype(int)
    assert photo.moments == tuple((int(band.sum()), int((band**2).sum())) for band in values.T)
    with pytest.raises(BadSampleError, match="not a TIFF or PNG"):
        canonical_photo(Trees.image(), None, PhotoRules(bands=CHOSEN))


def test_a_png_that_only_looks_like_one_is_a_photo():
    grey = Trees.encode(np.zeros((24, 32), np.uint8))
    assert decode_image(grey).shape == (24, 32, 3)


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_pictures_show_three_bands_or_grey(bands):
    pixels = np.random.default_rng(bands).integers(0, 255, (4, 5, bands), np.uint8)
    assert (decode_image(encode_bands(pixels)) == pixels).all()
    assert (shown(pixels) == (pixels[:, :, :3] if bands >= 3 else pixels[:, :, [0, 0, 0]])).all()
