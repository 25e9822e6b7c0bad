"""What only a GPU can show: its kernels of batch norm, the compiled grid, and steps that wait for nothing.

With TEST_DEVICE=cpu all of it but batch norm's kernels runs without a GPU: the rehearsal of benchmarks/gpu.py.
"""

import copy
import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.methods import METHODS, Method
from pipeline.ops import kernel
from pipeline.ops.entropy import entropy
from pipeline.ops.grid import QuarterGrid, make_grid, upsample
from pipeline.training.optim import Optimizer, build_optimizer
from pipeline.training.snapshot import snapshot
from tests.unit.methods.conftest import batch, small, step
from tests.unit.models.test_norm import KERNELS

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no GPU")


# ---- batch norm over all ranks ------------------------------------------------------------------------------------


def _close(name: str, tolerance: float, *args: object) -> tuple[Tensor, ...]:
    """What a kernel of the GPU returns, after a comparison with its definition on the CPU; in-place results, too."""
    on_gpu = [each.to(DEVICE) if isinstance(each, Tensor) else each for each in args]
    found, expected = getattr(torch, name)(*on_gpu), KERNELS[name](*args)  # type: ignore[operator]
    found, expected = ((each,) if isinstance(each, Tensor) else tuple(each) for each in (found, expected))
    for one, two in zip((*found, *on_gpu), (*expected, *args), strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one.cpu(), two, rtol=tolerance, atol=tolerance)
    return expected


@pytest.mark.skipif(not ON_GPU, reason="kernels of GPUs alone")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_batch_norm_kernels_are_what_the_tests_without_a_gpu_take_them_for(dtype, tolerance, layout):
    torch.manual_seed(0)
    x = (torch.randn(6, 8, 9, 7) + 2).to(dtype, memory_format=layout)
    grad = torch.randn(6, 8, 9, 7).to(dtype, memory_format=layout)
    weight, bias, eps = torch.rand(8) + 0.5, torch.randn(8), 1e-5
    mean, scale = _close("batch_norm_stats", 1e-4, x, eps)
    means, scales = torch.stack([mean, mean + 1]), torch.stack([scale, 2 * scale])
    counts = torch.tensor([378.0, 63.0])
    mean, scale = _close(
        "batch_norm_gather_stats_with_counts", 1e-4, x, means, scales, torch.zeros(8), torch.ones(8), 0.1, eps, counts
    )
    _close("batch_norm_elemt", tolerance, x, weight, bias, mean, scale, eps)
    total, dotted, *_ = _close("batch_norm_backward_reduce", 1e-3, grad, x, mean, scale, weight, True, True, True)
    _close("batch_norm_backward_elemt", tolerance, grad, x, mean, scale, weight, total, dotted, counts.int())


# ---- compiled functions ---------------------------------------------------------------------------------------------


@pytest.fixture
def _compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernel, "_active", False)
    assert kernel.activate(DEVICE)
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("classes", [21, 150])
def test_the_compiled_grid_gives_the_labels_and_the_entropy_of_float64(classes):
    torch.manual_seed(0)
    logits = torch.randn(2, classes, 17, 17) * 3
    grid = make_grid((65, 65), (17, 17))
    assert isinstance(grid, QuarterGrid)
    exact = upsample(logits.double(), (65, 65))
    label = grid.label(logits.to(DEVICE)).cpu()
    assert (label != exact.argmax(1)).float().mean() < 1e-3, "up to ties"
    assert int(label.max()) < classes
    found = grid.shrink(grid.entropy(logits.to(DEVICE))).cpu()
    rows = torch.arange(17) * 65 // 17
    torch.testing.assert_close(found, entropy(exact)[:, rows][:, :, rows].float(), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("_compiled")
def test_the_compiled_label_of_what_is_no_number_is_a_class():
    torch.manual_seed(0)
    logits = torch.randn(1, 21, 9, 9)
    logits[:, :, 2:4, 2:4], logits[:, 3, 6, 6] = math.nan, math.inf
    label = make_grid((33, 33), (9, 9)).label(logits.to(DEVICE))
    assert 0 <= int(label.min()) <= int(label.max()) < 21


# ---- steps --------------------------------------------------------------------------------------------------------


def _tell_of_waits(mode: str) -> None:
    if ON_GPU:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture
def _told_of_waits() -> Iterator[None]:
    yield
    _tell_of_waits("default")


def _train(
    method: Method, optimizer: Optimizer, index: int, precision: torch.dtype, given: Batch | None = None
) -> dict[str, Tensor]:
    """One step as the trainer makes it; returns the losses."""
    torch.manual_seed(index)
    with torch.autocast(DEVICE.type, precision, enabled=precision != torch.float32):
        terms = method(given or batch().to(DEVICE), step(index)).terms
    optimizer.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    optimizer.step()
    method.after_step(step(index))
    return terms


@pytest.mark.usefixtures("_told_of_waits")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_nothing_and_stays_finite(name, precision):
    method = small(name).to(DEVICE)
    optimizer = build_optimizer(method, method.config.optim)
    _train(method, optimizer, 4, precision)  # the first one makes what lives on
    given = batch().to(DEVICE)
    _tell_of_waits("error")
    terms = _train(method, optimizer, 5, precision, given)
    _tell_of_waits("default")
    assert all(torch.isfinite(value) for value in terms.values()), terms
    assert all(parameter.isfinite().all() for parameter in method.parameters())


@pytest.mark.usefixtures("_told_of_waits")
def test_a_snapshot_waits_for_nothing_and_is_the_state_before_the_next_step():
    method = small("u2pl").to(DEVICE)
    optimizer = build_optimizer(method, method.config.optim)
    _train(method, optimizer, 4, torch.float32)
    given, state = batch().to(DEVICE), {"method": method.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    expected = copy.deepcopy(state)
    _tell_of_waits("error")
    taken = snapshot(state)
    _train(method, optimizer, 5, torch.float32, given)
    _tell_of_waits("default")
    torch.testing.assert_close(taken(), expected, rtol=0, atol=0, check_device=False)
    assert not any(tensor.is_cuda for tensor in taken()["method"].values())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_goes_on_from_its_state_as_if_it_had_not_stopped(name):
    one = small(name).to(DEVICE)
    first = build_optimizer(one, one.config.optim)
    _train(one, first, 4, torch.float32)
    states = copy.deepcopy((one.state_dict(), first.state_dict()))
    two = small(name).to(DEVICE)
    second = build_optimizer(two, two.config.optim)
    two.load_state_dict(states[0])
    second.load_state_dict(states[1])
    terms = [_train(method, own, 5, torch.float32) for method, own in ((one, first), (two, second))]
    torch.testing.assert_close(terms[0], terms[1], rtol=1e-4, atol=1e-5)
    after = [dict(method.named_parameters()) for method in (one, two)]
    torch.testing.assert_close(after[0], after[1], rtol=1e-3, atol=1e-5)
