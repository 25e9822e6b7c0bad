import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pipeline.models import norm
from pipeline.models.norm import SyncBatchNorm2d, sync_batchnorm


def _net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
    for bn in (net[1], net[4]):
        nn.init.normal_(bn.weight, 1.0, 0.3)  # type: ignore[arg-type]
    return net.to(dtype)


def _batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 3, 9, 7, dtype=dtype) * 3 + 20, torch.randn(6, 5, 7, 5, dtype=dtype)


def _step(net: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Forward and backward of a loss that is a sum over images, and a second forward as a teacher does it."""
    x = x.clone().requires_grad_()
    y = net(x)
    ((y - target) ** 2).sum().backward()
    with torch.no_grad():
        again = net(x * 2)
    grads = {f"grad {name}": p.grad for name, p in net.named_parameters()}
    return {"y": y.detach(), "again": again, "grad x": x.grad, **grads, **net.state_dict()}  # type: ignore[dict-item]


CASES = [([0, 3, 6], torch.float32, 1e-3), ([0, 1, 6], torch.float64, 1e-9)]
"""Images of each worker are cuts[rank]:cuts[rank + 1]; type; tolerance."""


# ---- CUDA's kernels, written out for CPUs from what they compute ---------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _centred(x: Tensor, mean: Tensor) -> Tensor:
    return _wide(x) - mean.view(1, -1, 1, 1)


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = _wide(x).mean((0, 2, 3))
    return mean, (_centred(x, mean).square().mean((0, 2, 3)) + eps).rsqrt()


def _gather_stats(
    x: Tensor,
    means: Tensor,
    scales: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    count, weights = counts.sum(), counts[:, None]
    mean = (means * weights).sum(0) / count
    var = ((scales.pow(-2) - eps + (means - mean).square()) * weights).sum(0) / count
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * count / (count - 1), momentum)
    return mean, (var + eps).rsqrt()


def _elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, eps: float) -> Tensor:
    return (_centred(x, mean) * (scale * weight).view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)).to(x.dtype)


def _backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, dotted = _wide(grad).sum((0, 2, 3)), (_wide(grad) * _centred(x, mean)).sum((0, 2, 3))
    return total, dotted, dotted * scale, total.clone()


def _backward_elemt(
    grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, total: Tensor, dotted: Tensor, counts: Tensor
) -> Tensor:
    assert counts.dtype == torch.int32
    shape, count = (1, -1, 1, 1), counts.sum()
    slope = (scale.square() * dotted / count).view(shape)
    direct = _wide(grad) - (total / count).view(shape) - _centred(x, mean) * slope
    return (direct * (scale * weight).view(shape)).to(x.dtype)


KERNELS = {
    "batch_norm_stats": _stats,
    "batch_norm_gather_stats_with_counts": _gather_stats,
    "batch_norm_elemt": _elemt,
    "batch_norm_backward_reduce": _backward_reduce,
    "batch_norm_backward_elemt": _backward_elemt,
}
"""By name in torch; tests/gpu compares them with those of a GPU."""


@contextmanager
def _way(name: str) -> Iterator[None]:
    """Takes the way of every device, or that of CUDA, whose kernels stand above."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "fused":
            patch.setattr(norm, "_is_fused", lambda x: True)
            for kernel, function in KERNELS.items():
                patch.setattr(torch, kernel, function)
        yield


def _worker(rank: int, store: str, way: str) -> None:
    with _way(way):
        _work(rank, store)


def _work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = []
    for cuts, dtype, _ in CASES:
        x, target = (part[cuts[rank] : cuts[rank + 1]] for part in _batch(dtype))
        results.append(_step(sync_batchnorm(_net(dtype)), x, target))
    with torch.autocast("cpu", torch.bfloat16):
        net = sync_batchnorm(_net())
        low = net(_batch()[0])
    low.float().square().sum().backward()
    assert low.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    torch.save(results, f"{store}.{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["plain", "fused"])
def test_two_workers_equal_one_with_the_whole_batch(way: str, tmp_path: Path):
    torch.set_num_threads(1)
    store = str(tmp_path / "store")
    mp.spawn(_worker, (store, way), nprocs=2)  # type: ignore[attr-defined]
    workers = [torch.load(f"{store}.{rank}", weights_only=True) for rank in range(2)]
    for (_, dtype, tolerance), first, second in zip(CASES, *workers, strict=True):
        for key, expected in _step(_net(dtype), *_batch(dtype)).items():
            if key in ("y", "again", "grad x"):
                actual = torch.cat([first[key], second[key]])
            elif key.startswith("grad"):
                actual = first[key] + second[key]  # what DDP does, up to its division
            else:
                assert torch.equal(first[key], second[key]), key
                actual = first[key]
            assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance), key


def test_one_process_is_plain_batch_norm():
    plain, sync = _net(), sync_batchnorm(_net())
    expected, actual = _step(plain, *_batch()), _step(sync, *_batch())
    assert list(plain.state_dict()) == list(sync.state_dict())
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_conversion_keeps_parameters_and_mode():
    net = _net().eval()
    before = {name: id(p) for name, p in net.named_parameters()}
    sync = sync_batchnorm(net)
    assert sync is net
    assert {name: id(p) for name, p in sync.named_parameters()} == before
    kinds = [type(m) for m in sync.modules() if isinstance(m, nn.BatchNorm2d)]
    assert kinds == [SyncBatchNorm2d] * 2
    assert not any(m.training for m in sync.modules())
    assert isinstance(sync_batchnorm(nn.BatchNorm2d(3)), SyncBatchNorm2d)
    again = copy.deepcopy(sync_batchnorm(sync))
    assert again.state_dict().keys() == sync.state_dict().keys()
