"""Compiled, the losses are what they are uncompiled at full size; the case and the step are the benchmark's."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.u2pl_step import Case, Shape, make_case, ours
from pipeline.ops import grid, kernel

SHAPE = Shape(classes=7, images=2, small=17)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels run compiled, as at the sizes of the GPU presets."""
    monkeypatch.setattr(kernel, "_active", False)
    assert kernel.activate(torch.device("cpu"))
    yield
    torch._dynamo.reset()


def _step(groups: int) -> tuple[Case, Tensor]:
    case = make_case(SHAPE, channels_last=True, queue=100, background=150)
    torch.manual_seed(0)  # the draws
    loss = ours(case, groups)(True)
    loss.backward()
    return case, loss.detach()


@pytest.mark.usefixtures("compiled")
def test_loss_and_gradients_are_those_of_the_plain_functions(monkeypatch):
    assert isinstance(grid.make_grid((65, 65), (17, 17)), grid.QuarterGrid)
    fast = _step(0)
    monkeypatch.setattr(kernel, "_active", False)
    assert isinstance(grid.make_grid((65, 65), (17, 17)), grid.FullGrid)
    plain = _step(0)
    torch.testing.assert_close(fast[1], plain[1], rtol=1e-6, atol=0)
    for name in ("student_logits", "student_features"):
        one, two = (getattr(case, name).grad for case, _ in (fast, plain))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7 * float(two.abs().max() / 1e-3))


def test_shared_negatives_change_the_draw_and_not_the_rest():
    own, shared = _step(0), _step(64)
    assert own[1] != shared[1]
    torch.testing.assert_close(own[1], shared[1], rtol=0.02, atol=0)
    assert torch.equal(own[0].student_logits.grad, shared[0].student_logits.grad)  # type: ignore[arg-type]
