from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.methods.gct import GCT, exchange, flaw_target, handled
from pipeline.models import upsample
from pipeline.ops.schedules import sigmoid_ramp
from tests.unit.methods.conftest import SIZE, batch, step

SIDE = (SIZE, SIZE)


@pytest.fixture
def gct(build) -> GCT:
    return cast("GCT", build("gct"))


def _gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]


def test_one_backward_is_the_two_phases_of_the_release(build):
    """Networks first, with the detector frozen; then the detector, with the predictions frozen."""
    on = batch()
    one, two = cast("GCT", build("gct")), cast("GCT", build("gct"))
    torch.stack(list(one(on, step(10)).terms.values())).sum().backward()

    terms = two(on, step(10)).terms
    two.detector.requires_grad_(False)
    networks = [*two.left.parameters(), *two.right.parameters()]
    task = terms["supervised"] + terms["dynamic_consistency"] + terms["flaw_correction"]
    of_task = torch.autograd.grad(task, networks, retain_graph=True)
    two.detector.requires_grad_(True)
    of_detector = torch.autograd.grad(terms["flaw_detector"], list(two.detector.parameters()))
    for found, expected in zip([*_gradients(one.left), *_gradients(one.right)], of_task, strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(_gradients(one.detector), of_detector, strict=True):
        torch.testing.assert_close(found, expected)
    assert any(gradient.any() for gradient in of_detector)


def test_each_loss_reaches_its_own_parameters_alone(gct):
    terms = gct(batch(), step(10)).terms
    terms["flaw_detector"].backward(retain_graph=True)
    assert not any(g.any() for net in (gct.left, gct.right) for g in _gradients(net))
    gct.zero_grad()
    (terms["flaw_correction"] + terms["dynamic_consistency"]).backward()
    assert not any(g.any() for g in _gradients(gct.detector))
    assert any(g.any() for g in _gradients(gct.left))


class _Known(nn.Module):
    """A detector that takes the probability of class 0, stretched, for the flaw."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, normal: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
        del normal
        return self.scale * probability[:, :1]


def test_losses_follow_the_equations(build):
    method, on = cast("GCT", build("gct", limit=0.4)), batch()
    method.detector = _Known()  # type: ignore[assignment]
    terms = method(on, step(1)).terms
    assert on.unlabeled is not None
    assert on.labeled.mask is not None
    images, valid = torch.cat([on.labeled.image, on.unlabeled.image]), torch.cat([on.labeled.valid, on.unlabeled.valid])
    p = [upsample(net(images).logits, SIDE).softmax(1) for net in (method.left, method.right)]
    flaws = [3 * probability[:, :1] for probability in p]
    shared = exchange(p[0], p[1], handled(flaws[0]), handled(flaws[1]), 0.4)
    assert shared.both_bad.any()
    consistency = sum(F.mse_loss(p[k].movedim(1, -1)[valid], shared.targets[k].movedim(1, -1)[valid]) for k in (0, 1))
    correction = sum((shared.both_bad * flaw**2).squeeze(1)[valid].mean() for flaw in flaws)
    targets = [flaw_target(probability[:2], on.labeled.mask, 0.5, 1) for probability in p]
    seen = on.labeled.valid
    detector = sum(((flaws[k][:2] - targets[k]) ** 2).squeeze(1)[seen].mean() for k in (0, 1)) / 2
    ramp = sigmoid_ramp(1, 2)
    torch.testing.assert_close(terms["dynamic_consistency"], 100 * ramp * consistency, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(terms["flaw_correction"], correction, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(terms["flaw_detector"], 10 * detector, rtol=1e-3, atol=1e-6)


def test_the_networks_start_apart_and_the_left_one_is_the_result(gct):
    assert list(gct.networks()) == ["left", "right"]
    assert any(not torch.equal(a, b) for a, b in zip(gct.left.parameters(), gct.right.parameters(), strict=True))
