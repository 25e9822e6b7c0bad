"""From encoded bytes to views: scaled decoding, and every damaged format of the fault list."""

import io
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from pipeline.batch import Views
from pipeline.config.schema import DataConfig
from pipeline.ingest import augment
from pipeline.ingest.augment import ViewRecipe, empty_views, fill, view_bytes
from pipeline.ingest.read import Sample

SIZE = (240, 320)
RECIPE = ViewRecipe(DataConfig(crop=(64, 72), scale=(0.15, 0.3)), seed=0, strong=1)


def _encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _scene(seed: int = 0) -> tuple[Image.Image, np.ndarray]:
    """Bright discs on smooth noise, and where they are (1)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    mask = np.zeros(SIZE, np.uint8)
    for row, column, radius in zip(rng.uniform(0, 240, 5), rng.uniform(0, 320, 5), rng.uniform(20, 50, 5), strict=True):
        mask[(y - row) ** 2 + (x - column) ** 2 < radius**2] = 1
    noise = Image.fromarray(rng.integers(0, 90, (*SIZE, 3), np.uint8)).filter(ImageFilter.GaussianBlur(3))
    return Image.fromarray(np.asarray(noise) + 120 * mask[..., None]), mask


def _filled(image: bytes, mask: bytes | None = None, recipe: ViewRecipe = RECIPE, epoch: int = 0) -> tuple[Views, str]:
    sample = Sample(epoch, "picture", image, mask)
    views = empty_views([sample], recipe, lambda shape, dtype: torch.full(shape, 1, dtype=dtype))
    outcome = fill(sample, recipe, views, 0)
    assert outcome.seconds > 0
    return views, outcome.problem


# ---- scaled decoding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [(0.12, 0.125), (0.2, 0.25), (0.3, 0.5), (0.15, 0.9)])
def test_scaled_decoding_shows_the_same(scale, monkeypatch):
    """Same geometry, same labels, nearly the same colours as decoding whole."""
    recipe = replace(RECIPE, data=replace(RECIPE.data, scale=scale))
    used = []
    reduction = augment.reduction
    for seed in range(6):
        picture, truth = _scene(seed)
        image, mask = _encoded(picture, quality=92), _encoded(Image.fromarray(truth), "PNG")
        monkeypatch.setattr(augment, "reduction", reduction)
        quick, problem = _filled(image, mask, recipe, epoch=seed)
        monkeypatch.setattr(augment, "reduction", lambda window: used.append(reduction(window)) or 1)
        whole, _ = _filled(image, mask, recipe, epoch=seed)
        assert problem == ""
        assert torch.equal(quick.valid, whole.valid)
        assert torch.equal(quick.truth, whole.truth)
        one, two = quick.image.float(), whole.image.float()
        apart, moved = (one - two).abs().mean(), (two[..., 1:] - two[..., :-1]).abs().mean()
        assert apart < min(2.5, max(0.5, moved / 2))  # less than half of what a shift by one pixel makes
        bright = quick.image[0].float().mean(0) > 105  # half way between ground and disc
        assert (bright != (quick.truth[0] == 1))[quick.valid[0]].float().mean() < 0.05  # the outlines alone
    assert max(used) == {0.125: 8, 0.25: 4, 0.5: 2, 0.9: 2}[scale[1]]


def test_png_is_decoded_whole():
    picture, _ = _scene()
    jpeg, png = (_filled(_encoded(picture, form))[0].image.float() for form in ("JPEG", "PNG"))
    assert (jpeg - png).abs().mean() < 4


def test_memory_is_what_it_says():
    picture, truth = _scene()
    image, mask = _encoded(picture), _encoded(Image.fromarray(truth), "PNG")
    for views, labeled in ((_filled(image, mask)[0], True), (_filled(image)[0], False)):
        strong = len(views.strong)
        tensors = [t for t in (views.image, views.mask, views.valid, *views.strong) if t is not None]
        assert sum(t.nbytes for t in tensors) == view_bytes(RECIPE, classes=labeled, strong=strong)


# ---- damage ---------------------------------------------------------------------------------------------------


def _png_of_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be larger."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _jpeg_of_size(width: int, height: int) -> bytes:
    data = _encoded(_scene()[0])
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def _flipped(data: bytes) -> bytes:
    spoiled = bytearray(data)
    for place in range(len(data) // 3, len(data) - 16, 97):
        spoiled[place] ^= 0x5A
    return bytes(spoiled)


UNUSABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "removed": (lambda: b"", "no bytes"),
    "html": (lambda: b"<html><body>503 Slow Down</body></html>", "not a JPEG"),
    "gif": (lambda: _encoded(_scene()[0], "GIF"), "not a JPEG"),
    "short jpeg": (lambda: _encoded(_scene()[0])[:2000], "(?i)truncated"),
    "jpeg without a header": (lambda: _encoded(_scene()[0])[20:], "not a JPEG"),
    "short png": (lambda: _encoded(_scene()[0], "PNG")[:2000], "(?i)truncated|broken"),
    "flipped png": (lambda: _flipped(_encoded(_scene()[0], "PNG")), "."),
    "png bomb": (lambda: _png_of_size(60_000, 60_000), "exceeds limit"),
    "jpeg bomb": (lambda: _jpeg_of_size(60_000, 60_000), "exceeds limit"),
    "large": (lambda: _png_of_size(9000, 9000), "more than 64,000,000"),
    "0x0 png": (lambda: _png_of_size(0, 0), "."),
    "0x0 jpeg": (lambda: _jpeg_of_size(0, 0), "."),
    "16 bit": (lambda: _encoded(Image.fromarray(np.full(SIZE, 40_000, np.uint16)), "PNG"), "16 bits a channel"),
}


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("labeled", [True, False])
def test_what_cannot_be_used_leaves_no_pixel_that_counts(name, labeled):
    make, words = UNUSABLE[name]
    mask = _encoded(Image.fromarray(_scene()[1]), "PNG") if labeled else None
    views, problem = _filled(make(), mask)
    _assert_skipped(views)
    assert re.search(words, problem), problem


@pytest.mark.parametrize("name", ["size", "colours", "jpeg", "short"])
def test_a_mask_that_cannot_be_used(name):
    picture, truth = _scene()
    whole = _encoded(Image.fromarray(truth), "PNG")
    mask, words = {
        "size": (_encoded(Image.fromarray(truth[:, :-1]), "PNG"), "different sizes"),
        "colours": (_encoded(picture, "PNG"), "mask of mode RGB"),
        "jpeg": (_encoded(Image.fromarray(truth)), "not a PNG"),
        "short": (whole[: len(whole) // 2], "."),
    }[name]
    views, problem = _filled(_encoded(picture), mask)
    _assert_skipped(views)
    assert re.search(words, problem), problem


def _assert_skipped(views: Views) -> None:
    assert not views.valid.any()
    assert views.mask is None or (views.mask == 255).all()
    for view in (views.image, *views.strong):
        assert torch.equal(view[0].float().mean((1, 2)), torch.tensor([124.0, 116.0, 104.0]))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes_are_used(mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    views, problem = _filled(_encoded(_scene()[0].convert(mode), form))
    assert problem == ""
    assert views.valid.any()


def test_jpegs_with_flipped_bytes_end_no_process():
    """Most decode to a wrong picture, which only the shard's checksums can tell."""
    data = _encoded(_scene()[0])
    rng = np.random.default_rng(0)
    problems = []
    for _ in range(150):
        spoiled = bytearray(data)
        for place in rng.integers(0, len(data), 8):
            spoiled[place] = int(rng.integers(0, 256))
        problems.append(_filled(bytes(spoiled))[1])
    assert any(problems)
    assert not all(problems)
