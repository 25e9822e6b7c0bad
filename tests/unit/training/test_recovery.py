"""Where a run goes on: checkpoints are asked, not what is written beside them."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline import checkpoint, storage
from pipeline.checkpoint import Progress, Score
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.training.recovery import RECORD_FILE, recover, whole

NAMES = [checkpoint.name(step) for step in (30, 20, 10)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints: at 10 and 30 nothing was scored, at 20 something was."""
    for step in (10, 20, 30):
        folder = tmp_path / checkpoint.name(step)
        folder.mkdir()
        score = Score(20, {"student": 0.5}, [0.5]) if step >= 20 else None
        checkpoint.save(folder, Config(), {}, {}, Progress(step, score, score), method={})
    (tmp_path / "step_0000040").mkdir()
    (tmp_path / "step_0000040/state.pt").touch()  # an upload that was cut off
    return tmp_path


def spoil(run: Path, name: str) -> None:
    file = run / name / "state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def record(run: Path) -> dict:
    return json.loads((run / RECORD_FILE).read_text())


def test_the_newest_whole_one_is_taken(run, capsys):
    assert whole(str(run)) == NAMES
    assert capsys.readouterr().out == ""


def test_what_was_cut_off_is_named_if_there_is_nothing_else(run, capsys):
    for name in NAMES:
        (run / name / "checkpoint.json").unlink()
    assert whole(str(run)) == []
    said = capsys.readouterr().out
    assert said == (
        f"{run}: step_0000010, step_0000020, step_0000030, step_0000040 lack checkpoint.json, "
        "so no checkpoint is whole: the run begins at step 0\n"
    )


@pytest.mark.parametrize("what", ["state", "meta", "no state"])
def test_a_damaged_one_is_named_and_the_one_before_it_taken(run, capsys, what):
    if what == "state":
        spoil(run, NAMES[0])
    elif what == "meta":
        (run / NAMES[0] / "checkpoint.json").write_text("{")
    else:
        (run / NAMES[0] / "state.pt").unlink()
    assert whole(str(run)) == NAMES[1:]
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith(f"{run}/{NAMES[0]}/")
    assert said.endswith(": the one before it is taken\n")


def test_a_run_that_has_checkpoints_never_begins_anew_by_itself(run):
    for name in NAMES:
        spoil(run, name)
    with pytest.raises(UserError, match=rf"^\S+/{NAMES[0]}/state\.pt: damaged .* --fresh starts the run anew$"):
        recover(str(run))


def test_a_run_without_checkpoints_begins_at_the_first_step(run):
    (run / RECORD_FILE).write_text('{"latest": "step_0000030"}')  # Ray would look for it, and not find it
    for name in NAMES:
        shutil.rmtree(run / name)
    recover(str(run))
    assert not (run / RECORD_FILE).exists()


@pytest.mark.parametrize("there", ["nothing", "half of it", "of an older checkpoint"])
def test_rays_record_is_made_of_the_checkpoints(run, there):
    recover(str(run))
    text = (run / RECORD_FILE).read_text()
    if there == "nothing":
        (run / RECORD_FILE).unlink()
    elif there == "half of it":
        (run / RECORD_FILE).write_text(text[: len(text) // 2])
    else:
        (run / RECORD_FILE).write_text(text.replace(NAMES[0], NAMES[2]))
    recover(str(run))
    assert record(run) == json.loads(text)
    results = {each["checkpoint_dir_name"]: each["metrics"] for each in record(run)["checkpoint_results"]}
    assert results == {NAMES[2]: {"step": 10, "score": -1.0}, NAMES[0]: {"step": 30, "score": -1.0},
                       NAMES[1]: {"step": 20, "score": 0.5}}  # fmt: skip
    assert list(results)[-1] == NAMES[1]  # the best one last, as Ray sorts them
    assert record(run)["latest_checkpoint_result"]["checkpoint_dir_name"] == NAMES[0]


@pytest.mark.parametrize(
    "error", [OSError("AWS Error NETWORK_CONNECTION"), PermissionError("no"), ConnectionError("x")]
)
def test_trouble_of_the_storage_is_no_damage(run, capsys, monkeypatch, error):
    """Else a run would go on from an older checkpoint because a store was away for a second."""
    read = storage.read_bytes

    def fails(uri: str) -> bytes:
        if NAMES[0] in uri:
            with storage.translated(uri):
                raise error
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", fails)
    with pytest.raises(UserError, match=NAMES[0]):
        recover(str(run))
    assert capsys.readouterr().out == ""


def test_nothing_goes_before_the_chosen_one_is_known_to_be_whole(run):
    spoil(run, NAMES[1])
    with pytest.raises(UserError, match=r"damaged .*; choose another one for --resume_from"):
        recover(str(run), NAMES[1])
    assert checkpoint.written(str(run)) == NAMES


def test_a_chosen_one_is_taken_and_later_ones_go(run):
    recover(str(run), NAMES[1])
    assert checkpoint.written(str(run)) == NAMES[1:]
    assert record(run)["latest_checkpoint_result"]["checkpoint_dir_name"] == NAMES[1]
    with pytest.raises(UserError, match=rf"--resume_from step_7: \S+ has no such checkpoint; it has {NAMES[1]}, step"):
        recover(str(run), "step_7")
    spoil(run, NAMES[2])
    with pytest.raises(UserError, match=r"damaged .*; choose another one for --resume_from"):
        recover(str(run), NAMES[2])
