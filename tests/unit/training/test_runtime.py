from pathlib import Path

import pytest

from pipeline import checkpoint, storage
from pipeline.checkpoint import META_FILE, STATE_FILE, Progress
from pipeline.config.schema import Config
from pipeline.training import runtime
from pipeline.training.lease import Superseded
from pipeline.training.runtime import PlainRuntime


def _host(out: Path) -> PlainRuntime:
    """That of an attempt which has begun."""
    host = PlainRuntime(str(out))
    host.lease.take()
    return host


def _write(folder: Path) -> None:
    checkpoint.save(folder, Config(), {}, {}, Progress(), method={})


def test_a_reported_checkpoint_is_the_latest(tmp_path):
    host = _host(tmp_path)
    assert host.latest() is None
    for step in (5, 10):
        host.report(step, None, _write)
    assert host.latest() == f"{tmp_path}/step_0000010"
    assert storage.list_files(f"{tmp_path}/step_0000010") == [META_FILE, STATE_FILE]


def test_a_checkpoint_of_an_attempt_that_comes_back_is_refused(tmp_path):
    late, now = _host(tmp_path), _host(tmp_path)
    with pytest.raises(Superseded):
        late.report(5, None, _write)
    now.report(10, None, _write)
    assert now.latest() == f"{tmp_path}/step_0000010"
    assert storage.list_files(f"{tmp_path}/step_0000005") == []


def test_other_ranks_write_nothing(tmp_path):
    PlainRuntime(str(tmp_path)).report(5, 0.5, None)
    assert not list(tmp_path.iterdir())


def test_brief_trouble_costs_no_checkpoint(tmp_path, monkeypatch):
    host, write, failed = _host(tmp_path), storage.write_bytes, []

    def flaky(uri: str, data: bytes) -> None:
        if uri not in failed:
            failed.append(uri)
            raise ConnectionResetError("by peer")
        write(uri, data)

    monkeypatch.setattr(runtime.storage, "write_bytes", flaky)
    monkeypatch.setattr(runtime.storage.time, "sleep", lambda seconds: None)
    host.report(5, None, _write)
    assert host.latest() == f"{tmp_path}/step_0000005"
    assert len(failed) == 2


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    """What makes it whole goes last, so a writer that dies before leaves none."""
    write = storage.write_bytes

    def dies_at_the_description(uri: str, data: bytes) -> None:
        if uri.endswith(META_FILE):
            raise KeyboardInterrupt
        write(uri, data)

    host = _host(tmp_path)
    host.report(5, None, _write)
    monkeypatch.setattr(runtime.storage, "write_bytes", dies_at_the_description)
    with pytest.raises(KeyboardInterrupt):
        host.report(10, None, _write)
    assert (tmp_path / "step_0000010" / STATE_FILE).exists()
    assert host.latest() == f"{tmp_path}/step_0000005"
