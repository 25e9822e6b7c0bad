import errno
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import checkpoint, storage
from pipeline.checkpoint import META_FILE, STATE_FILE, Progress
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.patience import Patience
from pipeline.training import runtime
from pipeline.training.lease import Superseded
from pipeline.training.runtime import Agreement, PlainRuntime, RayRuntime


def _host(out: Path) -> PlainRuntime:
    """That of an attempt which has begun."""
    host = PlainRuntime(str(out))
    host.attempt.take()
    return host


def _write(folder: Path) -> None:
    checkpoint.save(folder, Config(), {}, {}, Progress(), method={})


def _reported(host: PlainRuntime, step: int) -> None:
    host.report(step, None, _write)
    host.drain()


def test_a_reported_checkpoint_is_the_latest(tmp_path):
    host = _host(tmp_path)
    assert host.latest() is None
    for step in (5, 10):
        _reported(host, step)
    assert host.latest() == f"{tmp_path}/step_0000010"
    assert storage.list_files(f"{tmp_path}/step_0000010") == [META_FILE, STATE_FILE]


def test_a_checkpoint_of_an_attempt_that_comes_back_is_refused(tmp_path):
    late, now = _host(tmp_path), _host(tmp_path)
    with pytest.raises(Superseded):
        _reported(late, 5)
    _reported(now, 10)
    assert now.latest() == f"{tmp_path}/step_0000010"
    assert storage.list_files(f"{tmp_path}/step_0000005") == []


def test_other_ranks_write_nothing(tmp_path):
    host = PlainRuntime(str(tmp_path))
    host.report(5, 0.5, None)
    host.drain()
    assert not list(tmp_path.iterdir())


def test_brief_trouble_costs_no_checkpoint(tmp_path, monkeypatch):
    host, write, failed = _host(tmp_path), storage.write_bytes, []

    def flaky(uri: str, data: bytes) -> None:
        if uri not in failed:
            failed.append(uri)
            raise ConnectionResetError("by peer")
        write(uri, data)

    monkeypatch.setattr(runtime.storage, "write_bytes", flaky)
    monkeypatch.setattr("pipeline.patience.time.sleep", lambda seconds: None)
    _reported(host, 5)
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
    _reported(host, 5)
    monkeypatch.setattr(runtime.storage, "write_bytes", dies_at_the_description)
    with pytest.raises(KeyboardInterrupt):
        _reported(host, 10)
    assert (tmp_path / "step_0000010" / STATE_FILE).exists()
    assert host.latest() == f"{tmp_path}/step_0000005"


def test_another_thread_writes_and_what_goes_wrong_there_is_met_once(tmp_path):
    host, goes_on = _host(tmp_path), threading.Event()

    def write(folder: Path) -> None:
        assert goes_on.wait(60)
        raise UserError("no room")

    host.report(5, None, write)
    goes_on.set()  # this thread has come here while the other one writes
    with pytest.raises(UserError, match="no room"):
        host.drain()
    host.drain()
    assert host.latest() is None
    _reported(host, 10)
    assert host.latest() == f"{tmp_path}/step_0000010"


@pytest.fixture
def ray_thread(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], Future[Any]]]:
    """In the place of `ray.train.report`: what it was given, and the end of the upload in a thread, as Ray has one."""
    import ray.train

    thread, calls = ThreadPoolExecutor(1), list[tuple[dict[str, Any], Future[Any]]]()

    def report(metrics: dict[str, Any], *, checkpoint: Any, checkpoint_dir_name: str, **options: Any) -> None:
        upload = options["checkpoint_upload_fn"]
        calls.append(({**metrics, **options}, thread.submit(upload, checkpoint, checkpoint_dir_name)))

    monkeypatch.setattr(ray.train, "report", report)
    return calls


def _worker(out: Path) -> RayRuntime:
    worker = RayRuntime(str(out), "", {}, Patience(0.1), None)
    worker.attempt.take()
    return worker


def test_rays_thread_writes_and_ray_hears_of_what_is_whole(tmp_path, ray_thread):
    worker, goes_on = _worker(tmp_path), threading.Event()

    def write(folder: Path) -> None:
        assert goes_on.wait(60)
        _write(folder)

    worker.report(5, 0.5, write)
    ((given, upload),) = ray_thread
    assert (given["step"], given["score"]) == (5, 0.5)
    assert not upload.done()
    goes_on.set()
    worker.drain()
    assert upload.result(60).path == f"{tmp_path}/step_0000005"
    assert storage.list_files(f"{tmp_path}/step_0000005") == [META_FILE, STATE_FILE]


def test_what_rays_thread_cannot_write_is_one_line_for_both_and_leaves_no_folder(tmp_path, ray_thread):
    worker, folders = _worker(tmp_path), list[Path]()

    def write(folder: Path) -> None:
        folders.append(folder)
        raise OSError(errno.ENOSPC, "full")

    worker.report(5, None, write)
    with pytest.raises(UserError, match=r"checkpoint-\w+: no space is left on the disk"):
        worker.drain()
    ((given, upload),) = ray_thread
    with pytest.raises(UserError, match="no space"):
        upload.result(60)
    with pytest.raises(UserError, match="no space"):  # Ray's own second try
        given["checkpoint_upload_fn"](SimpleNamespace(path=str(folders[0])), "step_0000005")
    assert len(folders) == 1
    assert not folders[0].exists()
    assert checkpoint.written(str(tmp_path)) == []


def test_a_rank_alone_agrees_with_itself_at_once():
    agreement = Agreement()
    assert [agreement.greatest(value) for value in (0, 2, 1)] == [0, 2, 1]
