"""Services that records are sent to, without any network: Weights & Biases offline, MLflow in a folder."""

import importlib.util
import json
import logging
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config.schema import Config, RunConfig
from pipeline.errors import UserError
from pipeline.patience import Patience
from pipeline.training import services
from pipeline.training.launch import delete_run
from pipeline.training.lease import Attempt
from pipeline.training.services import check_services, scalars
from pipeline.training.trackers import Tracker
from tests.processes import wait_for


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent, nothing of the developer's shell holds."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setattr(services, "END_SECONDS", 300.0)  # on a busy machine W&B's own process takes long to start


def attempt(out: Path, start: int, steps: list[int], *, wandb: bool = False, mlflow: bool = False) -> None:
    """One attempt of a run, which logs these steps."""
    config = Config(out=str(out), run=RunConfig(tensorboard=False, wandb=wandb, mlflow=mlflow))
    claim = Attempt(str(out), "", Patience())
    claim.take()
    tracker = Tracker(config, start, claim)
    for step in steps:
        tracker.log("train", step, {"total": step / 2, "loss": {"supervised": 1.0}, "iou": [0.5, None]})
    tracker.show(steps[-1], page(steps[-1]), {})
    tracker.close()


def page(value: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (value, 0, 0))


def steps_of(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_numbers_of_a_record() -> None:
    values = {"total": 1.5, "loss": {"a": 2, "b": None}, "iou": [0.5], "note": "text"}
    assert dict(scalars("train", values)) == {"train/total": 1.5, "train/loss/a": 2}


def test_mlflow_has_the_numbers_and_a_resumed_run_is_the_same_one(tmp_path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    out = tmp_path / "first"
    attempt(out, 0, [2, 4], mlflow=True)
    attempt(out, 4, [6], mlflow=True)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("u2pl").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["optim.lr"] == "0.001"
    history = client.get_metric_history(run.info.run_id, "train/total")
    assert [(each.step, each.value) for each in history] == [(2, 1.0), (4, 2.0), (6, 3.0)]
    assert set(run.data.metrics) == {"train/total", "train/loss/supervised"}
    for step in (4, 6):
        file = client.download_artifacts(run.info.run_id, f"pictures/step_{step:07d}.png", str(tmp_path))
        assert Image.open(file).convert("RGB").getpixel((0, 0)) == (step, 0, 0)
    delete_run(str(out))
    attempt(out, 0, [2], mlflow=True)
    assert len(client.search_runs([experiment])) == 2, "--fresh begins another one"


def logged(content: bytes, block: int = 1 << 15, head: int = 7) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after a head of its own: CRC, length, kind, content."""
    at, parts = head, b""
    while at + head <= len(content):
        if block - at % block < head:  # no place for another head
            at += block - at % block
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + head : at + head + size]
        at += head + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def offline(out: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """By file that Weights & Biases has written, in order of time: the run's id, and its rows."""
    messages, found = pytest.importorskip("wandb.proto.wandb_internal_pb2"), []
    for file in sorted((out / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        rows = []
        for data in logged(file.read_bytes()):
            record = messages.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        found.append((file.stem.removeprefix("run-"), rows))
    return found


def test_wandb_has_the_numbers_and_a_resumed_run_is_the_same_one(tmp_path) -> None:
    pytest.importorskip("wandb")
    attempt(tmp_path, 0, [2, 4], wandb=True)
    ended = int(time.time())
    wait_for("another second, by which W&B names an attempt's folder", lambda: int(time.time()) > ended)
    attempt(tmp_path, 4, [6], wandb=True)
    written = offline(tmp_path)
    assert {token for token, _ in written} == {(tmp_path / "tracking_id").read_text()}
    every = [row for _, rows in written for row in rows]
    rows = [row for row in every if "train/total" in row]
    pictures = [path for row in every for key, path in row.items() if key == "pictures/path"]
    colours = [Image.open(next((tmp_path / "wandb").glob(f"*/files/{path}"))).getpixel((0, 0)) for path in pictures]
    assert colours == [(4, 0, 0), (6, 0, 0)]
    shown = [(row["step"], row["train/total"], row["train/loss/supervised"]) for row in rows]
    assert shown == [(2, 1.0, 1.0), (4, 2.0, 1.0), (6, 3.0, 1.0)]


def test_a_service_that_does_not_answer_costs_one_warning(tmp_path, monkeypatch, caplog) -> None:
    pytest.importorskip("mlflow")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with caplog.at_level(logging.WARNING, "pipeline"):
            attempt(tmp_path, 0, [2, 4, 6], mlflow=True)
    assert steps_of(tmp_path) == [2, 4, 6]
    (told,) = [each.message for each in caplog.records if each.name.startswith("pipeline")]
    assert told.startswith("run.mlflow: nothing more is sent, the training goes on: ")


def test_what_a_service_that_has_failed_is_given_is_let_go(tmp_path, monkeypatch) -> None:
    """A run of days hands over pictures at each evaluation, whether anybody takes them or not."""

    class Failing(services.Mlflow):
        def begin(self, config: Config, token: str) -> None:
            raise ConnectionError("down")

    monkeypatch.setitem(services.SERVICES, "mlflow", Failing)
    sender = services.Sender("mlflow", Config(out=str(tmp_path)), "token")
    pages = [page(step) for step in range(3)]
    held = [weakref.ref(each) for each in pages]
    while pages:
        sender.show(len(pages), pages.pop())
    sender.close()
    assert [ref() for ref in held] == [None] * 3


def test_a_service_that_hangs_does_not_hold_up_the_end(tmp_path, monkeypatch, caplog) -> None:
    """A server that takes connections and says nothing."""
    pytest.importorskip("mlflow")
    monkeypatch.setattr(services, "END_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with caplog.at_level(logging.WARNING, "pipeline"):
            attempt(tmp_path, 0, [2, 4], mlflow=True)
    assert steps_of(tmp_path) == [2, 4]
    (told,) = [each.message for each in caplog.records if each.name.startswith("pipeline")]
    assert told == "run.mlflow: not all was sent within 0.5 s; the run is whole without it"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_before_any_worker(name, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))
    check_services(Config())
    with pytest.raises(UserError, match=rf"^run\.{name}: not installed; pip install 'u2pl-ray\[{name}\]'$"):
        check_services(Config(run=RunConfig(wandb=name == "wandb", mlflow=name == "mlflow")))
