import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor

from pipeline.ops import kernel

CPU = torch.device("cpu")


@kernel.kernel()
def _compiled_adds_one(x: Tensor) -> Tensor:
    return x + 1 if torch.compiler.is_compiling() else x - 1


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process's switch as a new process has it, and put back at the end."""
    monkeypatch.setattr(kernel, "_active", False)
    compiles = kernel.compiles  # a test may put another in its place
    compiles.cache_clear()
    torch._dynamo.reset()  # else what one test compiled serves the next, compiler or not
    yield
    compiles.cache_clear()
    torch._dynamo.reset()


def _runs_compiled() -> bool:
    return float(_compiled_adds_one(torch.zeros(4))[0]) == 1.0


def test_kernels_are_plain_until_activated():
    assert not kernel.is_active()
    assert not _runs_compiled()


@pytest.mark.usefixtures("switch")
def test_activated_kernels_are_compiled():
    assert kernel.activate(CPU)
    assert kernel.is_active()
    assert _runs_compiled()


@pytest.mark.usefixtures("switch")
def test_without_a_compiler_kernels_stay_plain_and_it_is_said_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, kernel.__name__), inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert not kernel.activate(CPU)
        assert not kernel.activate(CPU)
    messages = [record.getMessage() for record in caplog.records if record.name == kernel.__name__]
    assert len(messages) == 1
    assert "no compiler for cpu" in messages[0]
    assert "no-such-compiler" in messages[0]
    assert "\n" not in messages[0]
    assert not kernel.is_active()
    assert not _runs_compiled()


@pytest.mark.usefixtures("switch")
def test_a_function_that_fails_compiled_runs_as_it_is_written(monkeypatch, caplog):
    calls = []

    def breaks(function, **options):
        def run(x: Tensor) -> Tensor:
            calls.append(x)
            raise RuntimeError("no kernel for it\nand more")

        return run

    monkeypatch.setattr(torch, "compile", breaks)
    monkeypatch.setattr(kernel, "_active", True)
    doubled = kernel.kernel()(_doubled)
    with caplog.at_level(logging.WARNING, kernel.__name__):
        assert [float(doubled(torch.ones(()))) for _ in range(2)] == [2.0, 2.0]
        with pytest.raises(ValueError, match="no number"):
            kernel.kernel()(_refuses)(torch.ones(()))
    assert len(calls) == 2, "it is tried once"
    assert caplog.messages == ["_doubled runs uncompiled, right but slower: no kernel for it"]


def _doubled(x: Tensor) -> Tensor:
    return 2 * x


def _refuses(x: Tensor) -> Tensor:
    raise ValueError("no number")


@pytest.mark.usefixtures("switch")
def test_an_active_process_does_not_look_for_a_compiler_again(monkeypatch: pytest.MonkeyPatch):
    asked: list[torch.device] = []

    def compiles(device: torch.device) -> bool:
        asked.append(device)
        return True

    monkeypatch.setattr(kernel, "compiles", compiles)
    assert kernel.activate(CPU)
    assert kernel.activate(CPU)
    assert asked == [CPU]
