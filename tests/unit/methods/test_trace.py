"""No step waits for the device: it traces with tensors that have no values, and as one graph."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pipeline.batch import Batch, Views
from pipeline.methods import METHODS, Method
from tests.unit.methods.conftest import batch, step

CASES = {name: (name, {}) for name in sorted(METHODS)} | {
    f"u2pl {key}={value}": ("u2pl", {key: value})
    for key, value in {
        "variant": "upstream",
        "loss": "binary",
        "teacher_passes": 1,
        "mix": "classmix",
        "bank_dtype": "bfloat16",
        "prototype_ema": True,
    }.items()
}


def _total(method: Method, on: Batch) -> Tensor:
    return torch.stack(list(method(on, step(5)).terms.values())).sum()


@pytest.mark.parametrize("case", CASES)
def test_a_step_traces_without_values(case, build):
    name, options = CASES[case]
    method = build(name, **options)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(side: Views) -> Views:
        mask, pseudo = (None if each is None else mode.from_tensor(each) for each in (side.mask, side.pseudo))
        strong = tuple(map(mode.from_tensor, side.strong))
        return Views(mode.from_tensor(side.image), mask, mode.from_tensor(side.valid), side.ids, strong, pseudo)

    on = batch()
    assert on.unlabeled is not None
    hollow = Batch(fake(on.labeled), fake(on.unlabeled))
    with mode:
        total = _total(method, hollow)
        total.backward()
    assert total.shape == ()


def test_a_wait_would_be_noticed():
    mode = FakeTensorMode()
    with mode, pytest.raises(DataDependentOutputException):
        float(torch.ones(3).sum())


@pytest.mark.parametrize("case", CASES)
def test_a_step_compiles_as_one_graph_and_means_the_same(case, build):
    name, options = CASES[case]
    on, found = batch(), []
    torch._dynamo.reset()
    for wrap in (_as_it_is, _as_one_graph):
        method = build(name, **options)
        total = wrap(_total)(method, on)
        total.backward()
        gradients = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
        found.append((total.detach(), gradients, dict(method.named_buffers())))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


Total = Callable[[Method, Batch], Tensor]


def _as_it_is(function: Total) -> Total:
    return function


def _as_one_graph(function: Total) -> Total:
    return torch.compile(function, fullgraph=True, backend="eager")
