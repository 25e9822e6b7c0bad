"""The log of a trial: it can be read while the trial runs, and goes on behind that of an earlier attempt."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.sweep import tune
from tests.processes import wait_for


def test_a_log_can_be_read_meanwhile_and_is_whole_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "LOG_SECONDS", 0.05)
    log = tmp_path / "log.txt"
    log.write_text("an earlier attempt\n")
    with suppress(UserError), tune._logged(str(tmp_path)):
        print("reading")
        wait_for("the line", lambda: "reading" in log.read_text(), 20)
        print("no end of a line", end="")
        raise UserError("it failed")
    assert log.read_text() == "an earlier attempt\nreading\nno end of a line"


def test_a_log_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()
    with tune._logged(str(tmp_path)):
        print("trained")


def test_a_signal_that_was_lost_on_its_way_ends_the_sweep_at_the_next_turn() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray Train leaves one of its own
    with tune.LiveTable([], lambda params, place: pytest.fail("no trial"), 0) as live:
        live.on_step_begin(0, [])
        with suppress(KeyboardInterrupt):  # as in a destructor
            os.kill(os.getpid(), signal.SIGINT)
            wait_for("the signal", lambda: False)
        with pytest.raises(KeyboardInterrupt):
            live.on_step_begin(1, [])
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler


def test_a_signal_that_nothing_heeds_ends_the_driver_nevertheless() -> None:
    script = """
import time
from pipeline.sweep import tune

tune.END_SECONDS = 0.5
with tune.LiveTable([], lambda params, place: None, 0):
    while True:
        try:
            print("waiting", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("lost", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stdout.read() == "lost\nwaiting\n"
