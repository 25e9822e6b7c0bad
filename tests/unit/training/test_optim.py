import io
import math
from typing import Any

import pytest
import torch

from pipeline.config.cli import resolve
from pipeline.methods import OPTIONS, build_method
from pipeline.training.optim import Chain, build_optimizer, set_lr


def _parts(optimizer: str, method: str = "u2pl", backbone: str = "tiny", **optim: Any):
    values = {
        "method": method,
        "data": {"crop": (64, 64)},
        "model": {"backbone": backbone, "weights": "none", "feature_dim": 8},
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


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_one_kernel_for_all_parameters_means_the_same(name, monkeypatch):
    """On a GPU the optimiser is fused; torch has a fused one for CPUs, too."""
    found = []
    for gpu in (False, True):
        torch.manual_seed(0)
        monkeypatch.setattr(torch.Tensor, "is_cuda", gpu)
        built, optimizer, config = _parts(name)
        assert [bool(group["fused"]) for group in optimizer.param_groups] == [gpu, gpu]
        for step in range(3):
            set_lr(optimizer, config, step)
            for parameter in built.trained()[0].parameters():
                values = torch.linspace(-1, 1, parameter.numel()).view_as(parameter) * (step + 1)
                parameter.grad = torch.empty_like(parameter).copy_(values)  # in the layout of its parameter, as always
            optimizer.step()
        found.append([parameter.detach() for parameter in built.trained()[0].parameters()])
    torch.testing.assert_close(*found, rtol=2e-5, atol=1e-7)


def test_the_rate_is_a_function_of_the_step():
    _, optimizer, config = _parts("sgd", warmup=10)
    for step in (50, 0, 99):  # in any order, as after a resume
        rate = set_lr(optimizer, config, step)
        assert rate == pytest.approx(0.01 * min(1, (step + 1) / 10) * (1 - step / 100) ** 0.9)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, 10 * rate])


def test_the_rate_may_follow_a_cosine():
    _, optimizer, config = _parts("adamw", warmup=10, schedule="cosine")
    for step, factor in ((50, 0.5), (4, 0.5 * 0.5 * (1 + math.cos(math.pi * 0.04)))):
        assert set_lr(optimizer, config, step) == pytest.approx(0.01 * factor)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["u2pl", "cps", "gct"])
def test_layers_and_norms_may_have_rates_and_decays_of_their_own(name, method):
    built, optimizer, _ = _parts(name, method, "vit_tiny", layer_decay=0.5, decay_norms=False)
    names = {id(parameter): key for key, parameter in built.named_parameters()}
    held = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert held.keys() == {key for key, parameter in built.named_parameters() if parameter.requires_grad}
    for key, group in held.items():
        network, _, inner = key.partition(".encoder.")
        if inner:
            block = inner.partition("blocks.")[2][:1]
            layer = 4 if inner.startswith("norm.") else int(block) + 1 if block else 0
            assert group["lr_mult"] == 0.5 ** (4 - layer), key
        elif ".decoder." in key:
            assert group["lr_mult"] == 10, key
        if network in ("student", "first", "second") or ".decoder." in key:
            free = key.endswith(
                (".bias", "norm1.weight", "norm2.weight", "norm.weight", "gamma", "_token", "pos_embed")
            )
            assert group["weight_decay"] == (0 if free else 0.5), key
    assert len(optimizer.param_groups) < 20


def test_layers_of_other_encoders_are_their_stages():
    _, optimizer, _ = _parts("sgd", layer_decay=0.5)
    assert [group["lr_mult"] for group in optimizer.param_groups] == [0.25, 0.5, 1.0, 10.0]
