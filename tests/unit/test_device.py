"""What a step asks of a GPU, on tensors that have the device cuda and no values: no waits and no copies.

ResNet-18 stands for ResNet-101 here, and DINOv2-S for B: depth adds more of the same.
tests/parity/test_device_page.py takes the whole ones.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.device_step import CUDA, GPU_PRESETS, Counting, case, gradients, saved_bytes, trace
from pipeline.config.schema import presets
from pipeline.methods import METHODS
from pipeline.models import build_model

CASES = [(method, "voc_classic") for method in METHODS] + [("suponly", "cityscapes"), ("u2pl", "cityscapes")]
VITS = [("unimatch_v2", "voc_unimatch_v2"), ("u2pl", "voc_u2pl_vit")]


@pytest.mark.parametrize(
    ("method", "preset", "backbone"),
    [*((*each, "resnet18") for each in CASES), *((*each, "dinov2_vits14") for each in VITS)],
)
def test_a_step_on_four_gpus_neither_waits_nor_copies(method: str, preset: str, backbone: str):
    found, where = trace(case(method, preset, **{"model.backbone": backbone}), GPU_PRESETS[preset], 4)
    assert (found.waits, found.copies) == (0, 0), dict(where)
    assert found.collectives > 0
    assert found.saved > 2**29


@pytest.mark.parametrize("world", [1, 4, 8])
def test_u2pl_talks_as_much_as_the_page_on_scaling_says(world: int):
    config = case("u2pl", "voc_classic", **{"model.backbone": "resnet18"})
    found, _ = trace(config, 21, world)
    with torch.device("meta"):
        network = build_model(config.model, 21, features=True)
    norms = [module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    keys, quantiles = 21 * 256 * (256 * 4 + 1), 4 * 2**15 + 4 * 2 * 2**16
    positives, counts = 4 * 21 * (256 + 2), 3 * 8  # three means over pixels: L_s, and two of L_u
    statistics = 4 * sum(2 * (2 * each + 1) + 2 * each for each in norms)  # student, teacher; student backwards
    expected = (3 * len(norms) + 8, statistics + keys + quantiles + positives + counts) if world > 1 else (0, 0)
    assert (found.waits, found.copies) == (0, 0)
    assert (found.collectives, found.sent) == expected


def test_memory_falls_with_the_images_and_with_the_precision():
    values = {"model.backbone": "resnet18", "run.precision": "fp32"}
    one, four = (trace(case("suponly", "voc_classic", **values), 21, world)[0].saved for world in (1, 4))
    assert one == pytest.approx(4 * four, rel=0.02)
    half = trace(case("suponly", "voc_classic", **(values | {"run.precision": "bf16"})), 21, 4)[0].saved
    assert half == pytest.approx(0.52 * four, rel=0.05)


# ---- the counter itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        (lambda x: x.sum().item(), "waits"),
        (lambda x: x[x > 0], "waits"),
        (lambda x: x.masked_fill_(x > 0, 1).index_put_((x > 0,), x.sum()), "waits"),
        (lambda x: x.cpu(), "copies"),
        (lambda x: x.new_tensor([1.0, 2.0]), "copies"),
        (lambda x: x.copy_(torch.ones(3)), "copies"),
    ],
)
def test_what_waits_or_copies_is_counted(operation, kind):
    with FakeTensorMode(), Counting() as counting:
        operation(torch.empty(3, device=CUDA))
    assert {name for name in ("waits", "copies") if counting.count[name]} == {kind}


def test_what_backward_needs_is_weighed_once():
    x = torch.ones(10, requires_grad=True)
    half = x.exp()
    losses = [half.sin().sum(), half.view(2, 5).cos().sum()]
    assert saved_bytes(losses, []) == 40
    assert saved_bytes(losses, [half]) == 0
    assert saved_bytes([half.sum()], []) == 40, "the result of exp, and not what it was made of"


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.factor = factor
        return x * factor, x.detach() + 1

    @staticmethod
    def backward(ctx, one: Tensor, two: Tensor | None) -> tuple[Tensor, None]:  # type: ignore[override]
        return one * ctx.factor, None


def test_the_backward_pass_without_an_engine_is_that_of_autograd():
    def loss(weight: Tensor, scale: Tensor) -> Tensor:
        x = F.conv2d(torch.linspace(-1, 1, 384).view(2, 3, 8, 8), weight)
        x = F.batch_norm(x, None, None, scale, scale * 1, True).relu_()
        one, two = _Twice.apply(x, 3.0)  # type: ignore[misc]
        first, *_, last = torch.cat([one, two, x[:, 1:]], 1).unbind(1)
        return (first * last).square().sum() + (torch.ones(3, 4).double() + scale).sum().float()

    found = []
    for run in (Tensor.backward, gradients):
        torch.manual_seed(0)
        leaves = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.rand(4))
        run(loss(*leaves))
        found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*found)


def test_the_presets_are_those_of_gpus():
    assert set(GPU_PRESETS) == set(presets()) - {"demo", "camvid"}
