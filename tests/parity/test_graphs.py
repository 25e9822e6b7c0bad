"""A step of each method compiles as one graph, without a break that would wait for the device, and means the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.methods import Method
from tests.unit.methods.conftest import batch, small
from tests.unit.methods.test_trace import CASES, total

Total = Callable[[Method, Batch], Tensor]


DAILY = [case for case in CASES if case == "cps" or case.startswith("u2pl")]
NIGHTLY = [pytest.param(case, marks=pytest.mark.night) for case in CASES if case not in DAILY]
"""Others are traced each day in test_trace.py, which takes a tenth of the time."""


@pytest.mark.parametrize("case", [*DAILY, *NIGHTLY])
def test_a_step_compiles_as_one_graph_and_means_the_same(case):
    name, options = CASES[case]
    on, found = batch(), []
    torch._dynamo.reset()
    for wrap in (_as_it_is, _as_one_graph):
        method = small(name, **options)
        loss = wrap(total)(method, on)
        loss.backward()
        gradients = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
        found.append((loss.detach(), gradients, dict(method.named_buffers())))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def _as_it_is(function: Total) -> Total:
    return function


def _as_one_graph(function: Total) -> Total:
    return torch.compile(function, fullgraph=True, backend="eager")
