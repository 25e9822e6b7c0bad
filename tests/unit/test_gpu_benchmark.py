"""benchmarks/gpu.py keeps its budget and what it has measured, whatever becomes of a part."""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_steps import Settings, against, busy, counted
from benchmarks.u2pl_step import Shape, make_case, ours
from pipeline.ops import kernel
from tests import second_extra


def _settings(folder: Path, **values: str) -> dict[str, Any]:
    usual = {"device": "cpu", "data": str(folder / "data"), "folder": str(folder), "rows": str(folder / "rows")}
    return {**usual, "against": None, **values}


def test_a_part_that_fails_is_noted_with_what_it_had_measured(tmp_path: Path):
    (tmp_path / "file").touch()
    found = gpu.measure("machine", _settings(tmp_path, data=str(tmp_path / "file" / "data")), 600, tmp_path)
    assert found["error"] == "ended with code 1"
    assert "file" in found["log"][-1]
    assert [row["device"] for row in found["rows"]] == ["cpu"]


def test_a_part_ends_with_its_time(tmp_path: Path):
    began = time.monotonic()
    found = gpu.measure("b", _settings(tmp_path), gpu.GRACE + 0.5, tmp_path)
    assert "was ended after" in found["error"]
    assert time.monotonic() - began < 3 * gpu.GRACE


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, float]]:
    """Parts and their limits in the place of measurements; the second part fails, and each takes a second."""
    called: list[tuple[str, float]] = []
    now = 0.0

    def measure(part: str, settings: dict, limit: float, folder: Path) -> gpu.Row:
        nonlocal now
        now += 1
        called.append((part, limit))
        if len(called) > 1:
            written = json.loads((tmp_path / "out.json").read_text())["parts"]
            assert list(written) == [name for name, _ in called[:-1]]
        return {"s": 1.0, "rows": [{"x": len(called)}], **({"error": "lost", "log": ["why"]} if part == "a" else {})}

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    return called


def _run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out.json"), *arguments])
    gpu.main()
    return json.loads((tmp_path / "out.json").read_text())["parts"]


def test_the_file_is_written_after_each_part_and_the_others_go_on(told, monkeypatch, tmp_path, capsys):
    parts = _run(monkeypatch, tmp_path)
    assert list(parts) == ["machine", "a", "b", "d", "e", "f", "g"]
    assert [name for name, found in parts.items() if "error" in found] == ["a"]
    printed = capsys.readouterr()
    assert "a, 1 s: lost" in printed.out
    assert "why" in printed.err


def test_no_part_may_exceed_what_is_left(told, monkeypatch, tmp_path):
    _run(monkeypatch, tmp_path, "--budget_s", "40", "--parts", "b", "g")
    (first, second, third) = [limit for _, limit in told]
    weights = [gpu.WEIGHTS[name] for name, _ in told]
    assert first == pytest.approx(40 * weights[0] / sum(weights))
    assert second == pytest.approx(39 * weights[1] / sum(weights[1:]))
    assert third == 38


def test_a_second_implementation_is_measured_if_there_is_one(told, monkeypatch, tmp_path):
    assert list(_run(monkeypatch, tmp_path, "--against", "a:b", "--parts", "c")) == ["machine", "c"]


def test_what_a_second_implementation_needs_is_a_row_beside_ours(monkeypatch, tmp_path):
    """The rehearsal of part c, without a compiler."""
    monkeypatch.setattr(kernel, "activate", lambda device: False)
    rows: list[gpu.Row] = []
    against(Settings(**_settings(tmp_path, against="tests.second_extra:make")), rows.append)
    assert [(row["part"], row["by"]) for row in rows] == [
        (part, by) for part in ("whole extra", "entropy + CE") for by in ("ours", "tests.second_extra:make")
    ]
    assert all(row["ms"] > 0 for row in rows)
    assert [row["x ours"] for row in rows if row["by"] == "ours"] == [1, 1]


def test_the_second_implementation_and_ours_agree_on_the_loss_without_draws():
    shape = Shape(21, 2, 17)
    case = make_case(shape, channels_last=True, queue=30, background=50)
    one, two = (float(make(case)(False).detach()) for make in (partial(ours, groups=0), second_extra.make))
    assert one == pytest.approx(two, rel=1e-4)


def test_a_table_has_a_column_for_each_title():
    rows = [{"what": "a|b", "ms": 1234.56}, {"what": "c", "GiB": 0.123456}]
    assert gpu.table(rows).splitlines() == [
        "| what | ms | GiB |", "| --- | --- | --- |", "| a\\|b | 1235 |  |", "| c |  | 0.123 |"
    ]  # fmt: skip


def test_a_trace_is_counted_by_step():
    def event(kind: str, name: str, begin: float, length: float) -> dict:
        return {"cat": kind, "name": name, "ts": begin, "dur": length}

    events = [
        event("kernel", "gemm", 0, 2000),
        event("kernel", "add", 1000, 2000),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 4000, 1000),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 4000, 500),
        event("cuda_runtime", "cudaStreamSynchronize", 0, 10),
        event("cuda_runtime", "cudaLaunchKernel", 0, 10),
        event("cpu_op", "aten::add", 0, 10),
        {"cat": "kernel", "name": "no time of its own", "ts": 0},
    ]
    assert counted(events, 2) == {
        "operations": 0.5, "kernels": 1, "waits": 0.5, "copies to or from the host": 0.5, "busy ms": 2.0
    }  # fmt: skip


def test_busy_time_is_counted_once():
    assert busy([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert busy([]) == 0
