"""A compiled network is the network as it is written: losses, gradients, statistics, and which sizes are compiled."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pipeline.methods import Method
from pipeline.models.compiled import compile_networks, uncompiled
from tests.unit.methods.conftest import SIZE, batch, small, step


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _compiled() -> tuple[Method, str]:
    method = small("u2pl", aux=0.4)
    image = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    return method, compile_networks(list(method.networks().values()), method.trained()[0], image)


def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run as they were traced, which saves the time of the compiler."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graph.forward)


def _step(method: Method) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of a step in which every loss is in use."""
    torch.manual_seed(0)  # of dropout
    terms = method(batch(), step(4)).terms
    torch.stack(list(terms.values())).sum().backward()
    gradients = {name: each.grad for name, each in method.named_parameters() if each.grad is not None}
    return {name: value.detach() for name, value in terms.items()}, gradients


@pytest.mark.parametrize(
    "kernels", [pytest.param(False, id="graphs"), pytest.param(True, id="kernels", marks=pytest.mark.night)]
)
def test_losses_gradients_and_statistics_are_those_of_the_plain_network(monkeypatch, kernels):
    if not kernels:
        _without_kernels(monkeypatch)
    plain = small("u2pl", aux=0.4)
    fast, problem = _compiled()
    assert problem == ""
    assert counters["stats"]["unique_graphs"] > 5
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=0, atol=0)  # the trial leaves no trace
    assert all(parameter.grad is None for parameter in fast.parameters())
    expected, found = _step(plain), _step(fast)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in expected[1].values())
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-5 * scale)
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_validation_images_are_not_compiled(monkeypatch):
    _without_kernels(monkeypatch)
    method, problem = _compiled()
    assert problem == ""
    assert counters["stats"]["unique_graphs"] > 5
    compiled, plain = counters["stats"]["unique_graphs"], small("u2pl", aux=0.4)
    with torch.no_grad(), uncompiled():
        for size in (16, 24, 40):
            image = torch.full((1, 3, size, size), size, dtype=torch.uint8)
            assert torch.equal(method.predictor()(image), plain.predictor()(image))
    assert counters["stats"]["unique_graphs"] == compiled


class _Deep(nn.Module):
    """More equal blocks than torch keeps compiled forms of one piece of code."""

    def __init__(self) -> None:
        super().__init__()
        blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1 + 2 * n, padding=n), nn.ReLU()) for n in range(12))
        self.encoder, self.decoder = nn.ModuleDict({"blocks": blocks}), nn.ModuleDict()

    def forward(self, image: Tensor) -> tuple[Tensor, None]:
        x = image.float()
        for block in self.encoder["blocks"]:  # type: ignore[union-attr]
            x = block(x)
        return x, None


def test_every_block_is_compiled_however_many_are_alike(monkeypatch):
    _without_kernels(monkeypatch)
    network: Any = _Deep()
    assert compile_networks([network], network, torch.zeros(1, 3, 8, 8, dtype=torch.uint8)) == ""
    assert counters["stats"]["unique_graphs"] == 12


def test_a_network_that_does_not_compile_runs_as_it_is_written(monkeypatch):
    def breaks(*given: object, **options: object) -> object:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", breaks)
    method, problem = _compiled()
    assert "no such kernel" in problem
    assert "\n" not in problem
    expected, found = _step(small("u2pl", aux=0.4)), _step(method)
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])
