import io

import pytest
import torch

from pipeline.config.cli import resolve
from pipeline.methods import OPTIONS, build_method
from pipeline.training.optim import Chain, build_optimizer, set_lr


def _parts(optimizer: str, method: str = "u2pl", **optim: float):
    values = {
        "method": method,
        "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8},
        "optim": {"optimizer": optimizer, "lr": 0.01, "head_lr_mult": 10, "steps": 100, "weight_decay": 0.5, **optim},
    }
    config = resolve(values, OPTIONS)
    built = build_method(config, 3)
    return built, build_optimizer(built, config.optim), config.optim


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_it_moves_all_that_learns_and_nothing_twice(name, method):
    built, optimizer, config = _parts(name, method)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in built.parameters() if p.requires_grad}
    main = optimizer.parts[0] if isinstance(optimizer, Chain) else optimizer
    assert isinstance(main, torch.optim.SGD if name == "sgd" else torch.optim.AdamW)
    assert all(group["weight_decay"] == config.weight_decay for group in main.param_groups)
    assert name != "sgd" or all(group["momentum"] == 0.9 for group in main.param_groups)


def test_a_group_with_an_optimiser_of_its_own_steps_beside_the_others_and_resumes():
    """GCT's detector: Adam at its own rate, on the schedule of the run."""
    built, optimizer, config = _parts("sgd", "gct")
    assert isinstance(optimizer, Chain)
    assert [type(part) for part in optimizer.parts] == [torch.optim.SGD, torch.optim.Adam]
    for part in optimizer.parts:
        for parameter in part.param_groups[0]["params"][:1]:
            parameter.grad = torch.ones_like(parameter)
    set_lr(optimizer, config, 0)
    group = optimizer.parts[1].param_groups[0]
    assert group["lr"] == pytest.approx(1e-4)
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.99), 0.0)
    moved = group["params"][0]
    before = moved.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - moved, torch.full_like(before, 1e-4), rtol=0.01, atol=0)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = _parts("sgd", "gct")[1]
    other.load_state_dict(state)
    assert str(other.state_dict()) == str(state)
    optimizer.zero_grad()
    assert all(p.grad is None for p in built.parameters())


def test_the_rate_is_a_function_of_the_step():
    _, optimizer, config = _parts("sgd", warmup=10)
    for step in (50, 0, 99):  # in any order, as after a resume
        rate = set_lr(optimizer, config, step)
        assert rate == pytest.approx(0.01 * min(1, (step + 1) / 10) * (1 - step / 100) ** 0.9)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, 10 * rate])
