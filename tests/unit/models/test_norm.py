import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

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


def _worker(rank: int, store: str) -> None:
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


def test_two_workers_equal_one_with_the_whole_batch(tmp_path: Path):
    torch.set_num_threads(1)
    store = str(tmp_path / "store")
    mp.spawn(_worker, (store,), nprocs=2)  # type: ignore[attr-defined]
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
