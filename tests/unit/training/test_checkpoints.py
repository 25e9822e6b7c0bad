"""Another thread writes checkpoints while the loop goes on."""

import dataclasses
import logging
import re
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline import checkpoint, storage
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.methods import Step
from pipeline.methods.suponly import SupOnly
from pipeline.training import trainer
from tests.unit.ingest.loading import producing
from tests.unit.training.short_runs import Exploding, config_of, records, train

pytestmark = pytest.mark.usefixtures("small_validation_set")


class _Counted(SupOnly):
    """Says when a step is done."""

    done: ClassVar[dict[int, threading.Event]] = {}

    def after_step(self, step: Step) -> None:
        super().after_step(step)
        self.done[step.index + 1].set()


def _slow_to_write(monkeypatch: pytest.MonkeyPatch, until: dict[int, int]) -> list[tuple[int, bool]]:
    """Holds the checkpoint of a step up until another step is done; returns which were written, and whether it was."""
    done, save, written = {step: threading.Event() for step in range(1, 7)}, checkpoint.save, list[tuple[int, bool]]()

    def slow(folder: Path, config: Config, data: Any, about: Any, progress: checkpoint.Progress, **parts: Any) -> None:
        written.append((progress.step, done[until.get(progress.step, 1)].wait(60)))
        save(folder, config, data, about, progress, **parts)

    monkeypatch.setattr(_Counted, "done", done)
    monkeypatch.setattr(trainer, "build_method", lambda config, classes: _Counted(config, classes))
    monkeypatch.setattr(checkpoint, "save", slow)
    return written


def test_training_goes_on_while_a_checkpoint_is_written(shapes, tmp_path, monkeypatch):
    config = config_of(shapes, tmp_path / "slow")
    train(dataclasses.replace(config, out=str(tmp_path / "calm")))
    written = _slow_to_write(monkeypatch, {3: 4, 4: 6})
    train(config)
    assert written == [(3, True), (4, True), (6, True)]
    for step in (3, 4, 6):
        one, other = (checkpoint.read_meta(f"{tmp_path}/{run}/{checkpoint.name(step)}") for run in ("slow", "calm"))
        assert one.sha256 == other.sha256


def test_it_is_told_for_how_long_training_stood_still(shapes, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "pipeline.training.trainer")
    monkeypatch.setattr(trainer, "snapshot", lambda state: (time.sleep(0.4), lambda: state)[1])
    train(config_of(shapes, tmp_path))
    stalls = [record.get("checkpoint_stall", 0.0) for record in records(tmp_path) if record["kind"] == "train"]
    assert [stall >= 0.4 for stall in stalls] == [False, True, True], "none before step 2"
    assert len([line for line in caplog.messages if re.search(r"stall \d+%  checkpoint \d\.\d s  eta", line)]) == 2
    assert re.fullmatch(r"training stood still for checkpoints for \d\.\d s in all", caplog.messages[-1])


def test_a_checkpoint_that_cannot_be_written_ends_the_run(shapes, tmp_path, monkeypatch):
    """At the next one at the latest; what the run met in the meantime came later."""
    write, refused = storage.write_bytes, f"{checkpoint.name(3)}/{checkpoint.STATE_FILE}"

    def fails(uri: str, data: bytes) -> None:
        if uri.endswith(refused):
            raise UserError(f"{uri}: no room")
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", fails)
    for method in (SupOnly, Exploding):
        monkeypatch.setattr(Exploding, "bad", 3)
        monkeypatch.setattr(trainer, "build_method", lambda config, classes, kind=method: kind(config, classes))
        out = tmp_path / method.__name__
        with pytest.raises(UserError, match=rf"{refused}: no room"):
            train(config_of(shapes, out))
        assert checkpoint.newest(str(out)) is None
        assert not (out / checkpoint.name(4)).exists()
    assert not producing()
