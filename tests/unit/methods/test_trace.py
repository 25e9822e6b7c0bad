"""No step waits for the device: it traces with tensors that have no values. tests/parity/test_graphs.py compiles it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pipeline.batch import Batch, Views
from pipeline.methods import METHODS, Method
from tests.unit.methods.conftest import batch, step

CASES: dict[str, tuple[str, dict[str, Any]]] = (
    {name: (name, {}) for name in sorted(METHODS)}
    | {f"{name} on a transformer": (name, {"model": {"backbone": "vit_tiny"}}) for name in sorted(METHODS)}
    | {
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
)


def total(method: Method, on: Batch) -> Tensor:
    """The loss of a step."""
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
        loss = total(method, hollow)
        loss.backward()
    assert loss.shape == ()


def test_a_wait_would_be_noticed():
    mode = FakeTensorMode()
    with mode, pytest.raises(DataDependentOutputException):
        float(torch.ones(3).sum())
