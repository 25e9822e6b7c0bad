import io
import json
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.config.schema import Config, RunConfig
from pipeline.errors import UserError
from pipeline.patience import Patience
from pipeline.training.lease import Attempt, Superseded
from pipeline.training.trackers import Tracker, duration
from tests.s3 import S3Server


def _lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _claimed(out: str) -> Attempt:
    claim = Attempt(out, "", Patience())
    claim.take()
    return claim


def _config(out: str, *, tensorboard: bool = False) -> Config:
    return Config(out=out, run=RunConfig(tensorboard=tensorboard))


def _run(out: str, start: int, steps: list[int], *, tensorboard: bool = False) -> None:
    tracker = Tracker(_config(out, tensorboard=tensorboard), start, _claimed(out))
    for step in steps:
        tracker.log("train", step, {"total": step / 2, "loss": {"supervised": 1.0}})
    tracker.close()


def test_records_are_json_with_null_for_what_is_not_finite(tmp_path):
    tracker = Tracker(_config(str(tmp_path)), 0, _claimed(str(tmp_path)))
    tracker.log("train", 1, {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": -float("inf"), "e": 2}})
    tracker.log("eval", 1, {"iou": [0.5, None]})
    tracker.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    lines = _lines(tmp_path)
    ages = [(datetime.now(timezone.utc) - datetime.fromisoformat(line.pop("time"))).total_seconds() for line in lines]
    assert all(-1 <= age < 60 for age in ages)
    assert lines == [
        {"kind": "train", "step": 1, "a": None, "b": [1.0, None], "c": {"d": None, "e": 2}},
        {"kind": "eval", "step": 1, "iou": [0.5, None]},
    ]


def test_a_resume_drops_what_the_lost_attempt_wrote_after_the_checkpoint(tmp_path):
    _run(str(tmp_path), 0, [2, 4, 6])
    _run(str(tmp_path), 4, [6, 8])
    assert [line["step"] for line in _lines(tmp_path)] == [2, 4, 6, 8]
    _run(str(tmp_path), 0, [2])
    assert [line["step"] for line in _lines(tmp_path)] == [2]


def test_a_checkpoint_before_the_first_record_can_be_resumed(tmp_path):
    _run(str(tmp_path), 0, [])
    _run(str(tmp_path), 5, [10])
    assert [line["step"] for line in _lines(tmp_path)] == [10]


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_numbers(tmp_path):
    _run(str(tmp_path), 0, [2, 4], tensorboard=True)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.stat().st_size > 100
    assert _scalars(tmp_path / "tensorboard") == {
        "train/total": [(2, 1.0), (4, 2.0)],
        "train/loss/supervised": [(2, 1.0), (4, 1.0)],
    }


def test_tensorboard_has_the_iou_of_each_class_by_name(tmp_path):
    out = str(tmp_path)
    tracker = Tracker(_config(out, tensorboard=True), 0, _claimed(out), ("sky", "road"))
    tracker.log("eval", 3, {"miou": {"teacher": 0.5}, "iou": [0.5, None]})
    tracker.close()
    assert _scalars(tmp_path / "tensorboard") == {"eval/miou/teacher": [(3, 0.5)], "eval/iou/sky": [(3, 0.5)]}
    assert _lines(tmp_path)[0]["iou"] == [0.5, None]


def test_tensorboard_drops_the_lost_attempt_too(tmp_path):
    _run(str(tmp_path), 0, [2, 4, 6], tensorboard=True)
    _run(str(tmp_path), 4, [8], tensorboard=True)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert _scalars(tmp_path / "tensorboard")["train/total"] == [(2, 1.0), (4, 2.0), (8, 4.0)]


def test_a_file_in_the_place_of_tensorboard_is_named(tmp_path):
    (tmp_path / "tensorboard").write_text("notes")
    with pytest.raises(UserError, match=r"/tensorboard: a file is in the way of a folder; move it"):
        _run(str(tmp_path), 0, [2], tensorboard=True)


def _page(value: int) -> Image.Image:
    return Image.fromarray(np.full((4, 6, 3), value % 256, dtype=np.uint8))


def _shown(out: str, start: int, steps: list[int], *, tensorboard: bool = True) -> None:
    """Shows pictures as bright as their step, one of them with a name that TensorBoard does not take as it is."""
    tracker = Tracker(_config(out, tensorboard=tensorboard), start, _claimed(out))
    for step in steps:
        tracker.show(step, _page(step), {"a": _page(step), "b c/d": _page(step + 1)})
    tracker.close()


def _images(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Step and brightness of the images of a TensorBoard folder, by tag."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    found = {}
    for tag in events.Tags()["images"]:
        pictures = [(e.step, np.asarray(Image.open(io.BytesIO(e.encoded_image_string)))) for e in events.Images(tag)]
        assert all(pixels.shape == (4, 6, 3) and (pixels == pixels[0, 0]).all() for _, pixels in pictures)
        found[tag] = [(step, int(pixels[0, 0, 0])) for step, pixels in pictures]
    return found


def test_pictures_are_in_the_run_and_in_tensorboard(tmp_path):
    _shown(str(tmp_path), 0, [2, 4])
    for step in (2, 4):
        assert (np.asarray(Image.open(tmp_path / f"pictures/step_{step:07d}.png")) == np.asarray(_page(step))).all()
    assert _images(tmp_path / "tensorboard/pictures") == {"a": [(2, 2), (4, 4)], "b_c/d": [(2, 3), (4, 5)]}


def test_pictures_of_a_lost_attempt_go_and_others_stay(tmp_path):
    _shown(str(tmp_path), 0, [2, 4, 6, 9999999, 10000000])
    (tmp_path / "pictures/step_0000099.jpg").write_bytes(b"the user's")
    _shown(str(tmp_path), 4, [8])
    assert _images(tmp_path / "tensorboard/pictures")["a"] == [(2, 2), (4, 4), (8, 8)]
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["step_0000002.png", "step_0000004.png", "step_0000008.png", "step_0000099.jpg"]


def test_without_tensorboard_there_are_pictures_all_the_same(tmp_path):
    _shown(str(tmp_path), 0, [2], tensorboard=False)
    assert (tmp_path / "pictures/step_0000002.png").exists()
    assert not (tmp_path / "tensorboard").exists()


def test_an_attempt_that_comes_back_draws_nothing(tmp_path):
    late = Tracker(_config(str(tmp_path), tensorboard=True), 0, _claimed(str(tmp_path)))
    _shown(str(tmp_path), 0, [2])
    with pytest.raises(Superseded, match="another job has begun to train this run"):
        late.show(2, _page(7), {"a": _page(7)})
    assert _images(tmp_path / "tensorboard/pictures")["a"] == [(2, 2)]


def test_on_s3(s3: S3Server, tmp_path):
    out = f"{s3.bucket_uri}/{tmp_path.name}"
    _run(out, 0, [2, 4, 6], tensorboard=True)
    _run(out, 4, [8], tensorboard=True)
    steps = [json.loads(line)["step"] for line in storage.read_bytes(f"{out}/metrics.jsonl").decode().splitlines()]
    assert steps == [2, 4, 8]
    files = storage.list_files(f"{out}/tensorboard")
    assert len(files) == 2
    assert all(len(storage.read_bytes(f"{out}/tensorboard/{file}")) > 100 for file in files)
    _shown(out, 0, [2, 4, 6])
    _shown(out, 4, [8])
    assert storage.list_files(f"{out}/pictures") == [f"step_{step:07d}.png" for step in (2, 4, 8)]
    assert storage.list_files(f"{out}/tensorboard/pictures") == [f"step_{step:07d}.tfevents" for step in (2, 4, 8)]


@pytest.mark.parametrize(("seconds", "text"), [(45.9, "45s"), (60, "1m00s"), (200, "3m20s"), (3720, "1h02m")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_an_attempt_that_comes_back_changes_nothing(tmp_path):
    """The first attempt's machine was cut off, a second one went on without it."""
    late = Tracker(_config(str(tmp_path)), 0, _claimed(str(tmp_path)))
    late.log("train", 2, {"total": 1.0})
    late.flush()
    _run(str(tmp_path), 2, [4, 6])
    late.log("train", 4, {"total": 1.0})
    with pytest.raises(Superseded, match="another job has begun to train this run"):
        late.close()
    assert [line["step"] for line in _lines(tmp_path)] == [2, 4, 6]


def test_a_damaged_record_is_named(tmp_path):
    _run(str(tmp_path), 0, [2, 4, 6])
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text().replace('"step": 4', '"step": "'))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged \(.*\); remove the line, then the same"):
        _run(str(tmp_path), 4, [6])
