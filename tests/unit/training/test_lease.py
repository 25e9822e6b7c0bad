import itertools
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timedelta, tzinfo

import pytest

from pipeline import storage
from pipeline.errors import UserError
from pipeline.patience import Patience
from pipeline.training import lease
from pipeline.training.lease import Attempt, Superseded, held

HOLD = """
import sys
from pipeline.patience import Patience
from pipeline.training.lease import held

with held(sys.argv[1], Patience()):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks is on another machine than who holds: processes cannot be looked for, only listened to.

    The clock of each is a day ahead of that of the one before.
    """
    names, days = itertools.count(), itertools.count()

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Clock":
            return super().now(tz) + timedelta(next(days))

    monkeypatch.setattr(lease, "datetime", Clock)
    monkeypatch.setattr(lease, "_machine", lambda: f"machine {next(names)}")
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lease, "SILENCE_SECONDS", 1.5)


def _wants(out: str, grace: float = 0.0) -> None:
    with held(out, Patience(), grace):
        pass


def test_a_directory_has_one_writer(root):
    with held(root, Patience()):
        with pytest.raises(UserError, match=rf"is being written by .*process {os.getpid()} on .*use another --out"):
            _wants(root)
        with pytest.raises(UserError):
            _wants(root)
    _wants(root)


def test_of_many_jobs_one_wins(root):
    won, over = [], threading.Barrier(8)

    def job(number: int) -> str:
        with ExitStack() as stack:
            problem = ""
            try:
                stack.enter_context(held(root, Patience()))
                won.append(number)
            except UserError as error:
                problem = str(error)
            over.wait(30)
            return problem

    with ThreadPoolExecutor(8) as pool:
        problems = list(pool.map(job, range(8)))
    assert len(won) == 1
    assert sorted(map(bool, problems)) == [False] + 7 * [True]


def test_a_killed_job_is_known_on_its_machine(tmp_path):
    out = str(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {job.pid}"):
            _wants(out)
        job.kill()
        job.wait()
    began = time.monotonic()
    _wants(out)
    assert time.monotonic() - began < lease.SILENCE_SECONDS / 2


def test_a_job_that_lives_elsewhere_is_heard(root, elsewhere):
    with held(root, Patience()), pytest.raises(UserError, match="is being written by"):
        _wants(root)


def test_a_job_that_died_elsewhere_is_followed_after_its_silence(root, elsewhere, capsys):
    lease._take(storage.join(root, lease.LEASE_FILE), lease._own(), Patience(), 0.0)
    began = time.monotonic()
    _wants(root)
    assert time.monotonic() - began >= lease.SILENCE_SECONDS
    assert "was here before and did not say that it has ended: listening for up to" in capsys.readouterr().out


def test_grace_waits_for_a_job_that_is_about_to_end(tmp_path, elsewhere):
    out = str(tmp_path / "run")
    with ExitStack() as stack:
        stack.enter_context(held(out, Patience()))
        threading.Timer(1.2, stack.pop_all().close).start()
        _wants(out, grace=20.0)


def test_signs_of_life_leave_the_attempt_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    out = str(tmp_path / "run")
    with held(out, Patience()) as holder:
        attempt = Attempt(out, holder, Patience())
        attempt.take()
        for number in range(30):
            attempt.write(f"{out}/file", str(number).encode())
            time.sleep(0.01)
        assert lease._state(lease.versions.read(f"{out}/{lease.LEASE_FILE}")).beat > 3


def test_an_earlier_attempt_writes_no_more(root):
    with held(root, Patience()) as holder:
        first, second = (Attempt(root, holder, Patience()) for _ in range(2))
        first.take()
        first.write(f"{root}/file", b"1")
        second.take()
        with pytest.raises(Superseded, match="file: another job has begun"):
            first.write(f"{root}/file", b"late")
        second.write(f"{root}/file", b"2")
        assert storage.read_bytes(f"{root}/file") == b"2"


def test_workers_of_a_job_that_was_taken_for_dead_cannot_come_back(root):
    """Its controller may start workers anew; they must not become the newest attempt of the other job's run."""
    with held(root, Patience()) as former:
        uri = storage.join(root, lease.LEASE_FILE)
        lease._change(uri, former, lambda state: lease._State(beat=state.beat + 1))  # as if it had been silent
        with held(root, Patience()) as holder:
            now = Attempt(root, holder, Patience())
            now.take()
            with pytest.raises(Superseded):
                Attempt(root, former, Patience()).take()
            now.write(f"{root}/file", b"now")
    _wants(root)


def test_a_damaged_lease_is_somebodys_until_its_silence_is_over(tmp_path, elsewhere):
    folder = tmp_path / lease.LEASE_FILE
    folder.mkdir()
    (folder / "00000007").write_bytes(b'{"holder": 3')
    _wants(str(tmp_path))
    assert [file.name for file in folder.iterdir()] == ["00000009"]


def test_a_look_at_the_lease_takes_nothing_and_tells_who_may_live_elsewhere(tmp_path, monkeypatch):
    out = str(tmp_path)
    assert lease.check_free(out) == ""
    with held(out, Patience(1)):
        with pytest.raises(UserError, match="is being written by"):
            lease.check_free(out)
        monkeypatch.setattr(lease, "_machine", lambda: "another one")
        assert "process" in lease.check_free(out)
    monkeypatch.undo()
    assert lease.check_free(out) == ""
