"""`u2pl predict` as a user starts it: real Ray, a real S3 server, a driver that is killed half-way."""

import io
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipeline
from pipeline import storage
from pipeline.commands import predict
from pipeline.errors import UserError
from tests.jobs import Job
from tests.networks import train_briefly
from tests.processes import descendants, kill, wait_for

PHOTOS = 120
BROKEN = {7, 30, 31, 64, 119}
RECORD = re.compile(r"units/\d{7}\.json")


def photo(number: int) -> bytes:
    """A smooth picture whose size depends on its number."""
    coarse = Image.fromarray(np.random.default_rng(number).integers(0, 255, (6, 6, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((64 + number % 3, 48), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def run(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("run"))
    train_briefly(shapes, out)
    return out


def stamps(root: str) -> dict[str, object]:
    """When each file was written; the lease apart, which says every few seconds that its holder lives."""
    filesystem, path = storage.resolve(root)
    files = [name for name in storage.list_files(root) if name != "lease"]
    return {name: filesystem.get_file_info(f"{path}/{name}").mtime_ns for name in files}


def test_a_killed_prediction_goes_on_and_makes_nothing_twice(
    run: str, joined: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = "s3://data/predict/photos", "s3://runs/predict"
    files = {f"{number % 2}/{number:03d}": photo(number) for number in range(PHOTOS)}
    files = {name: data[:300] if int(name[2:]) in BROKEN else data for name, data in files.items()}
    for name, data in files.items():
        storage.write_bytes(f"{photos}/{name}.jpg", data)
    command = [sys.executable, "jobs/predict.py", run, "--images", photos, "--out", out, "--rank", "entropy"]
    with Job(command, joined, tmp_path / "first.log") as job:
        first = wait_for("the record of a unit", lambda: job.ended or _records(out), 240)
        kill(job.pid, *descendants(job.pid))
        assert first is not True, job.said
    wait_for("the dead driver's tasks to end", lambda: _quiet(out))
    before = stamps(out)
    done = _records(out)
    assert 0 < len(done) < 4
    with pytest.raises(UserError, match=r"holds masks made with other options \(rank\)"):
        predict([*command[2:], "--overlays"])
    with Job(command, joined, tmp_path / "second.log") as job:
        assert job.wait() == 0, job.said
    said = job.said.splitlines()
    assert said[-1] == f"115 masks in {out}, 5 images left out ({out}/left_out.txt names them)"
    assert f"predict: {4 - len(done)} of {4 - len(done)} units" in said
    after = stamps(out)
    assert {name: after[name] for name in done} == {name: before[name] for name in done}
    of_done = {name for record in done for name in _masks(out, record)}
    assert {name: after[name] for name in of_done} == {name: before[name] for name in of_done}
    named = [line.partition(":")[0] for line in storage.read_lines(f"{out}/left_out.txt")]
    assert named == sorted(f"{number % 2}/{number:03d}.jpg" for number in BROKEN)
    model = pipeline.load_model(run)
    masks = {name: storage.read_bytes(f"{out}/{name}") for name in after if name.startswith("masks/")}
    assert len(masks) == 115
    for name, data in masks.items():
        stem = name.removeprefix("masks/").removesuffix(".png")
        pixels = np.asarray(Image.open(io.BytesIO(files[stem])))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), model.predict(pixels))
    assert len(storage.read_lines(f"{out}/ranking.csv")) == 116
    assert storage.exists(f"{out}/ranking.html")
    predict(command[2:])  # all is done: this starts no Ray
    assert capsys.readouterr().out.splitlines()[-1] == said[-1]
    again = stamps(out)
    assert {name: again[name] for name in masks} == {name: after[name] for name in masks}


def _records(out: str) -> set[str]:
    return {name for name in storage.list_files(out) if RECORD.fullmatch(name)}


def _masks(out: str, record: str) -> set[str]:
    return {f"masks/{name}.png" for name in re.findall(r'"name": "([^"]+)"', storage.read_text(f"{out}/{record}"))}


def _quiet(out: str) -> bool:
    """Whether nothing has been written for two seconds."""
    before = stamps(out)
    time.sleep(2)
    return stamps(out) == before
