import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline
from pipeline import checkpoint
from pipeline.checkpoint import META_FILE, STATE_FILE, Progress, Score
from pipeline.config.parse import build
from pipeline.config.schema import Config
from pipeline.errors import UserError

DATA = {"index": "i", "split": "s", "classes": ["a", "b"]}
ABOUT = {"dataset": "d", "workers": 2}


def _saved(folder: Path, step: int = 7) -> Path:
    folder.mkdir(parents=True)
    progress = Progress(step, last=Score(step, {"teacher": 0.5, "student": 0.4}, [0.5, None]))
    progress.best = progress.last
    parts = {"method": {"w": torch.arange(5.0)}, "optimizer": {"state": {0: 1}}}
    checkpoint.save(folder, Config(split="1_2"), DATA, ABOUT, progress, **parts)
    return folder


def test_round_trip(tmp_path):
    place = str(_saved(tmp_path / "c"))
    state, meta = checkpoint.read_state(place), checkpoint.read_meta(place)
    assert torch.equal(state["method"]["w"], torch.arange(5.0))
    assert state["optimizer"] == {"state": {0: 1}}
    progress = Progress.from_dict(state["progress"])
    assert progress.last == Score(7, {"teacher": 0.5, "student": 0.4}, [0.5, None])
    assert progress.best == progress.last
    assert (meta.step, meta.data, meta.about, meta.version) == (7, DATA, ABOUT, pipeline.__version__)
    assert build(Config, meta.config) == Config(split="1_2")
    assert Progress.from_dict({"step": 3, "last": None, "best": None}) == Progress(3)


def test_the_best_score_is_kept():
    progress = Progress()
    scores = [Score(step, {"teacher": value, "student": 0.9}, []) for step, value in ((1, 0.3), (2, 0.6), (3, 0.5))]
    for score in scores:
        progress.scored(score)
    assert progress.last is scores[2]
    assert progress.best is scores[1]
    assert scores[1].value == 0.6


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_flipped_byte_is_named(tmp_path, place):
    folder = _saved(tmp_path / "c")
    payload = bytearray((folder / STATE_FILE).read_bytes())
    payload[place] ^= 1
    (folder / STATE_FILE).write_bytes(payload)
    with pytest.raises(UserError, match=r"state\.pt: damaged .*take another checkpoint"):
        checkpoint.read_state(str(folder))


def test_a_cut_file_is_named(tmp_path):
    folder = _saved(tmp_path / "c")
    (folder / STATE_FILE).write_bytes((folder / STATE_FILE).read_bytes()[:-10])
    with pytest.raises(UserError, match=r"state\.pt: damaged"):
        checkpoint.read_state(str(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"step": 1}'])
def test_a_damaged_description_is_named(tmp_path, text):
    folder = _saved(tmp_path / "c")
    (folder / META_FILE).write_text(text)
    for read in (checkpoint.read_meta, checkpoint.read_state):
        with pytest.raises(UserError, match=r"checkpoint\.json: not readable"):
            read(str(folder))


class _Evil:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self._path, "executed")


def _bare_pickle(value: Any) -> bytes:
    return pickle.dumps(value)


def _torch_pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("pack", [_bare_pickle, _torch_pickle])
def test_a_malicious_pickle_is_refused_unexecuted(tmp_path, pack):
    """Even with the right hash: whoever writes state.pt can write checkpoint.json."""
    folder, trace = _saved(tmp_path / "c"), tmp_path / "trace"
    payload = pack({"method": _Evil(trace)})
    (folder / STATE_FILE).write_bytes(payload)
    meta = json.loads((folder / META_FILE).read_text())
    meta["sha256"] = hashlib.sha256(payload).hexdigest()
    (folder / META_FILE).write_text(json.dumps(meta))
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        checkpoint.read_state(str(folder))
    assert not trace.exists()


def test_newest_is_the_whole_one_with_the_highest_step(tmp_path):
    assert checkpoint.newest(str(tmp_path)) is None
    for step in (9, 10, 100):
        _saved(tmp_path / checkpoint.name(step), step)
    _saved(tmp_path / "zzz_copy", 500)
    _saved(tmp_path / "step_old" / checkpoint.name(900), 900)
    (tmp_path / checkpoint.name(100) / META_FILE).unlink()  # its upload did not finish
    assert checkpoint.newest(str(tmp_path)) == f"{tmp_path}/step_0000010"
    _saved(tmp_path / checkpoint.name(12_345_678), 12_345_678)
    assert checkpoint.newest(str(tmp_path)) == f"{tmp_path}/step_12345678"


def test_find_takes_a_run_or_a_checkpoint(tmp_path):
    place = _saved(tmp_path / checkpoint.name(3), 3)
    assert checkpoint.find(str(tmp_path)) == checkpoint.find(str(place)) == str(place)
    with pytest.raises(UserError, match=r"no checkpoint there \(checkpoint\.json is missing\)"):
        checkpoint.find(str(tmp_path / "nothing"))
