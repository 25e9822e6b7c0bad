"""The page of `u2pl demo`: the real command, real requests, a real browser."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import demo
from pipeline.inference.export import export
from pipeline.inference.load import load_model
from pipeline.inference.pictures import colour_mask
from tests.browser import PROGRAM, Browser
from tests.docs import ROOT
from tests.networks import train_briefly
from tests.unit.report.test_dataset_page import Tags

PIXELS = np.random.default_rng(0).integers(0, 255, (3, 5, 3), np.uint8).repeat(16, 0).repeat(16, 1)
"""Squares as large as the blocks of JPEG, which it keeps well."""
TAB, RIGHT = ("Tab", 9), ("ArrowRight", 39)


@pytest.fixture(scope="module")
def run(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run directory."""
    out = str(tmp_path_factory.mktemp("demo") / "run")
    train_briefly(shapes, out)
    return out


@contextmanager
def served(*words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command; its address, and the process."""
    command = [sys.executable, "-m", "pipeline", "demo", *words, "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+) shows what the network sees; Ctrl-C ends it\n", line)
        assert found, line + (process.communicate()[1] if process.poll() is not None else "")
        yield found[1], process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(run: str) -> Iterator[str]:
    with served(run) as (found, _):
        yield found


def encoded(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def asked(address: str, data: bytes) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"{address}/look", data=data, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def picture(uri: str) -> np.ndarray:
    with urllib.request.urlopen(uri) as content:
        return np.asarray(Image.open(io.BytesIO(content.read())))


def test_an_image_gives_what_the_model_sees(address, run):
    model = load_model(run)
    mask = model.predict(PIXELS)
    status, seen = asked(address, encoded(PIXELS))
    assert status == 200
    assert (seen["width"], seen["height"], seen["notes"]) == (80, 48, [])
    assert np.array_equal(picture(seen["mask"]), colour_mask(mask, model.palette))
    ids, counts = np.unique(mask, return_counts=True)
    shares = {model.classes[each]: count / mask.size for each, count in zip(ids, counts, strict=True)}
    assert {each["name"]: each["share"] for each in seen["classes"]} == pytest.approx(shares)
    assert [each["share"] for each in seen["classes"]] == sorted(shares.values(), reverse=True)
    colours = {each["name"]: tuple(each["color"]) for each in seen["classes"]}
    assert colours == {name: model.palette[model.classes.index(name)] for name in shares}
    photo, overlay = picture(seen["photo"]).astype(int), picture(seen["overlay"]).astype(int)
    assert np.abs(photo - PIXELS).mean() < 8
    assert np.abs(overlay - (PIXELS / 2 + colour_mask(mask, model.palette) / 2)).mean() < 12
    assert picture(seen["entropy"]).shape == (48, 80, 3)


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_it_takes_checkpoints_and_exports(run, tmp_path, kind):
    place = next(str(each) for each in Path(run).glob("step_*"))
    if kind == "export":
        export(run, str(tmp_path), "safetensors")
        place = str(tmp_path)
    seen, expected = (demo.look(load_model(each), encoded(PIXELS)) for each in (place, run))
    assert seen == expected


def test_what_cannot_be_read_is_an_answer_and_the_page_lives_on(address):
    whole = encoded(PIXELS)
    for data, status, words in (
        (b"no image", 422, "cannot be read: not a JPEG, PNG, WEBP, BMP or TIFF"),
        (b"", 422, "cannot be read: no bytes"),
        (whole[: len(whole) // 2], 422, "cannot be read: "),
        (bytes(demo.MAX_BYTES + 1), 413, "larger than 32 MiB: take a smaller file"),
    ):
        found, answer = asked(address, data)
        assert found == status
        assert answer["error"].startswith(words)
    assert asked(address, whole)[0] == 200


def test_a_noted_rotation_is_told_and_not_applied(address):
    exif = Image.Exif()
    exif[0x0112] = 6
    _, plain = asked(address, encoded(PIXELS, "JPEG", quality=95))
    _, turned = asked(address, encoded(PIXELS, "JPEG", quality=95, exif=exif))
    assert (turned["width"], turned["mask"]) == (80, plain["mask"])
    (note,) = turned["notes"]
    assert "rotation (EXIF), which is not applied" in note
    assert plain["notes"] == []


def test_large_photos_are_shrunk_and_that_is_told(address):
    status, seen = asked(address, encoded(np.zeros((20, demo.MAX_SIDE * 2, 3), np.uint8)))
    assert (status, seen["width"], seen["height"]) == (200, demo.MAX_SIDE, 10)
    assert seen["notes"] == ["Shrunk from 4096 x 20 pixels; u2pl predict looks at all of them."]


def test_the_page_holds_everything_in_itself_and_names_its_controls(address, run):
    with urllib.request.urlopen(address, timeout=60) as answer:
        text = answer.read().decode()
    assert "://" not in text
    page = Tags(text)
    assert not [each for tag in ("script", "img", "link") for each in page.of(tag) if each.get("src")]
    assert [each["href"] for each in page.of("link")] == ["data:,"]
    for name in load_model(run).classes:
        assert name in page.text


def test_ctrl_c_ends_it_with_a_line_and_no_ray_was_started(run):
    with served(run) as (address, process):
        assert asked(address, encoded(PIXELS))[0] == 200
        packages = set(re.findall(r"/site-packages/([^/\s]+)/", Path(f"/proc/{process.pid}/maps").read_text()))
        assert "torch" in packages
        assert "ray" not in packages
        assert not children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "\nthe page is closed\n", "")


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_the_address_can_be_opened_as_it_is_printed():
    assert demo.address("127.0.0.1", 80) == "http://127.0.0.1:80"
    assert demo.address("::1", 8000) == "http://[::1]:8000"


def test_a_port_that_is_taken_is_one_line(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "pipeline", "demo", run, "--port", port]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(rf"u2pl demo: --host 127\.0\.0\.1 --port {port}: cannot listen there \(.*\); .*\n", done.stderr)


@pytest.mark.skipif(PROGRAM is None, reason="no chromium: apt-get install chromium")
def test_in_a_browser_with_the_keyboard_alone(address, tmp_path):
    file = tmp_path / "photo.png"
    file.write_bytes(encoded(PIXELS))
    (tmp_path / "notes.txt").write_text("no image")
    focused = "document.activeElement.id || document.activeElement.value || document.activeElement.tagName"
    view = "document.querySelector('#caption').textContent"
    with Browser() as browser:
        for width in (390, 1280):
            browser.open(address, width)
            browser.press(*TAB)
            assert browser.evaluate(focused) == "file"
            assert browser.evaluate("getComputedStyle(document.querySelector('#drop')).outlineStyle") == "solid"
            browser.choose("#file", file)
            browser.until("!document.querySelector('#result').hidden")
            assert "photo.png: 80 x 48 pixels" in browser.evaluate("document.querySelector('#status').textContent")
            assert browser.evaluate(view) == "The photo under its mask."
            browser.press(*TAB)
            assert browser.evaluate(focused) == "overlay"
            browser.press(*RIGHT)
            assert browser.evaluate(view) == "The most likely class of each pixel."
            browser.until("document.querySelector('#picture').naturalWidth === 80")
            assert browser.evaluate("document.querySelector('#picture').alt") == "mask of photo.png"
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            rows = browser.evaluate("[...document.querySelectorAll('#shares th')].map(each => each.textContent)")
            assert rows
            unnamed = "[...document.querySelectorAll('input')].filter(each => !each.labels.length).length"
            assert browser.evaluate(unnamed) == 0
            browser.choose("#file", tmp_path / "notes.txt")
            browser.until("document.querySelector('#error').textContent")
            told = browser.evaluate("document.querySelector('#error').textContent")
            assert told == "notes.txt: cannot be read: not a JPEG, PNG, WEBP, BMP or TIFF"
            assert browser.evaluate("document.querySelector('#result').hidden")
            assert {url.removeprefix(address) for url in browser.requests()} <= {"/look"}
            assert [each for each in browser.complaints() if "422" not in each] == []
