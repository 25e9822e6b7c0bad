"""Two workers exchange their gradients in half the bytes: `run.gradients bf16`."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import checkpoint
from pipeline.config.cli import resolve
from pipeline.config.schema import Config, as_dict
from pipeline.methods import OPTIONS, Method, build_method
from pipeline.training import trainer
from pipeline.training.runtime import PlainRuntime

STEPS = 3


def _config(root: str, out: Path, gradients: str) -> Config:
    return resolve(
        {
            "method": "suponly", "split": "1_4", "out": str(out / gradients),
            "data": {"root": root, "crop": [32, 32]},
            "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8},
            "optim": {"steps": STEPS, "batch_labeled": 4, "batch_unlabeled": 4},
            "run": {"checkpoint_every": 1, "log_every": 1, "tensorboard": False, "pictures": 0, "gradients": gradients},
        },
        OPTIONS,
    )  # fmt: skip


def _worker(rank: int, store: str, configs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for values in configs:
        config, methods = resolve(values, OPTIONS), list[Method]()

        def built(config: Config, classes: int, methods: list[Method] = methods) -> Method:
            methods.append(build_method(config, classes))
            return methods[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "build_method", built)
            trainer.train(config, PlainRuntime(str(config.out)))
        torch.save(methods[0].state_dict(), f"{config.out}.{rank}")
    dist.destroy_process_group()


def test_ranks_stay_equal_and_near_the_exact_exchange(shapes: str, tmp_path: Path):
    names = ("fp32", "bf16")
    values = [as_dict(_config(shapes, tmp_path, name)) for name in names]
    mp.spawn(_worker, (str(tmp_path / "store"), values), nprocs=2)  # type: ignore[attr-defined]
    for name in names:
        one, other = (torch.load(f"{tmp_path / name}.{rank}", weights_only=True) for rank in range(2))
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    first, exact, rounded = (_weights(tmp_path / name, step) for name, step in (("fp32", 1), ("fp32", 2), ("bf16", 2)))
    moved, apart = float((exact - first).norm()), float((exact - rounded).norm())
    assert 1e-5 * moved < apart < 0.02 * moved, "rounded, and to 8 bits at the least"


def _weights(run: Path, step: int) -> torch.Tensor:
    """The weights of a checkpoint in one row."""
    state = checkpoint.read_state(f"{run}/{checkpoint.name(step)}")["method"]
    return torch.cat([value.flatten() for name, value in state.items() if name.endswith("weight")])
