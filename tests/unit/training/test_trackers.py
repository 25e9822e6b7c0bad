import json
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import UserError
from pipeline.storage import Patience
from pipeline.training.lease import Lease, Superseded
from pipeline.training.trackers import Tracker, duration
from tests.s3 import S3Server


def _lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _claimed(out: str) -> Lease:
    claim = Lease(out, Patience())
    claim.take()
    return claim


def _run(out: str, start: int, steps: list[int], *, tensorboard: bool = False) -> None:
    tracker = Tracker(out, start, _claimed(out), tensorboard=tensorboard)
    for step in steps:
        tracker.log("train", step, {"total": step / 2, "loss": {"supervised": 1.0}})
    tracker.close()


def test_records_are_json_with_null_for_what_is_not_finite(tmp_path):
    tracker = Tracker(str(tmp_path), 0, _claimed(str(tmp_path)), tensorboard=False)
    tracker.log("train", 1, {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": -float("inf"), "e": 2}})
    tracker.log("eval", 1, {"iou": [0.5, None]})
    tracker.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert _lines(tmp_path) == [
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


def test_tensorboard_drops_the_lost_attempt_too(tmp_path):
    _run(str(tmp_path), 0, [2, 4, 6], tensorboard=True)
    _run(str(tmp_path), 4, [8], tensorboard=True)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert _scalars(tmp_path / "tensorboard")["train/total"] == [(2, 1.0), (4, 2.0), (8, 4.0)]


def test_on_s3(s3: S3Server, tmp_path):
    storage.reconnect()
    out = f"{s3.bucket_uri}/{tmp_path.name}"
    _run(out, 0, [2, 4, 6], tensorboard=True)
    _run(out, 4, [8], tensorboard=True)
    steps = [json.loads(line)["step"] for line in storage.read_bytes(f"{out}/metrics.jsonl").decode().splitlines()]
    assert steps == [2, 4, 8]
    files = storage.list_files(f"{out}/tensorboard")
    assert len(files) == 2
    assert all(len(storage.read_bytes(f"{out}/tensorboard/{file}")) > 100 for file in files)
    storage.reconnect()


@pytest.mark.parametrize(("seconds", "text"), [(45.9, "45s"), (60, "1m00s"), (200, "3m20s"), (3720, "1h02m")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_an_attempt_that_comes_back_changes_nothing(tmp_path):
    """The first attempt's machine was cut off, a second one went on without it."""
    late = Tracker(str(tmp_path), 0, _claimed(str(tmp_path)), tensorboard=False)
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
