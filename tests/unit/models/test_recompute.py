from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.schema import ModelConfig
from pipeline.models import build_model
from pipeline.models.norm import sync_batchnorm
from pipeline.models.parts import Prediction, StagedEncoder
from pipeline.models.recompute import blocks, by_parts, recomputed


class _Layers(nn.Module):
    """Two convolutions with batch norm and dropout; counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.5))
        self.head = nn.Conv2d(4, 2, 1)
        self.passes = list[int]()

    def forward(self, x: Tensor) -> Prediction:
        self.passes.append(len(x))
        return Prediction(self.head(self.layers(x)), None, None)


def _layers() -> _Layers:
    torch.manual_seed(0)
    return _Layers().train()


def _images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 7, 5, generator=torch.Generator().manual_seed(1))


def _learnt(net: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Gradients and buffers after the backward pass of a loss."""
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {**gradients, **{f"state {name}": buffer for name, buffer in net.named_buffers()}}


def test_what_is_recomputed_is_the_same_bit_for_bit():
    """Dropout draws the same numbers, and batch norm has seen the images once."""
    plain, again = _layers(), _layers()
    torch.manual_seed(3)
    expected, after = plain(_images()).logits, torch.rand(1)
    torch.manual_seed(3)
    found = recomputed(again, again, _images()).logits
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(found, expected)
    one, two = _learnt(plain, expected), _learnt(again, found)
    assert one.keys() == two.keys()
    assert all(torch.equal(two[key], value) for key, value in one.items())
    assert (plain.passes, again.passes) == ([6], [6, 6])
    assert two["state layers.1.num_batches_tracked"] == 1


def test_parts_pass_one_by_one_and_come_back_from_the_last():
    """Each has as many of the first images as of the last; the last part is not computed again."""
    seen = list[list[int]]()

    def function(x: Tensor) -> Tensor:
        seen.append(x.flatten().int().tolist())
        return x * x

    numbered = torch.arange(6.0).view(6, 1, 1, 1).requires_grad_()
    found = by_parts(nn.Identity(), function, numbered, 3)
    assert found.flatten().tolist() == [0, 1, 4, 9, 16, 25]
    found.sum().backward()
    assert seen == [[0, 3], [1, 4], [2, 5], [1, 4], [0, 3]]
    assert numbered.grad is not None
    assert numbered.grad.flatten().tolist() == [0, 2, 4, 6, 8, 10]


def test_statistics_of_batch_norm_are_those_of_the_parts():
    """One after the other: what is computed twice moves them once."""
    one, two = _layers(), _layers()
    for net in (one, two):
        net.layers[3].eval()
    expected = torch.cat([one(_images()[part::3]).logits for part in range(3)])
    found = by_parts(two, two, _images(), 3).logits
    assert torch.equal(torch.cat([found[part::3] for part in range(3)]), expected)
    _learnt(two, found)
    assert all(torch.equal(two.get_buffer(name), value) for name, value in one.named_buffers())
    assert two.get_buffer("layers.1.num_batches_tracked") == 3
    assert two.passes == [2] * 5


def test_images_that_make_no_equal_parts_are_refused():
    with pytest.raises(ValueError, match="6 images in 4 equal parts"):
        by_parts(nn.Identity(), torch.sin, _images(), 4)


BACKBONES = {"tiny": 8, "mobilenet_v2": 18, "resnet18": 9, "resnet101": 34}
"""With the number of blocks of each encoder."""


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_encoders_blocks_run_one_after_the_other(backbone: str):
    config = ModelConfig(backbone=backbone, weights="none", width=8)  # type: ignore[arg-type]
    encoder, x = build_model(config, 3, features=False).encoder.eval(), _images(1)
    assert isinstance(encoder, StagedEncoder)
    for stage in (encoder.low, encoder.mid, encoder.high):
        expected = stage(x)
        for block in blocks(stage):
            x = block(x)
        assert torch.equal(x, expected)
    found = [block for stage in (encoder.low, encoder.mid, encoder.high) for block in blocks(stage)]
    assert len(found) == BACKBONES[backbone]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("backbone", ["tiny", "resnet18", "vit_tiny"])
def test_a_network_that_recomputes_its_encoder_learns_the_same(backbone: str, micro_batches: int):
    image, found = (50 * _images(4).repeat(1, 1, 5, 7)).clamp(0, 255).to(torch.uint8), []
    for again in (False, True):
        config = ModelConfig(backbone=backbone, weights="none", width=8, checkpoint_activations=again)  # type: ignore[arg-type]
        torch.manual_seed(0)
        model = build_model(config, 3, features=False, micro_batches=micro_batches).train()
        torch.manual_seed(3)
        logits = model(image).logits
        found.append((logits.detach(), _learnt(model, logits)))
    (one, before), (two, after) = found
    assert torch.equal(one, two)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_passes_without_gradient_are_whole():
    model = build_model(ModelConfig(backbone="tiny", weights="none"), 3, features=False, micro_batches=2).train()
    image, sizes = torch.zeros(4, 3, 16, 16, dtype=torch.uint8), list[int]()
    model.encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    model(image)
    with torch.no_grad():
        model(image)
    model.eval()(image)
    assert sizes == [2, 2, 4, 4]


# ---- several workers ----------------------------------------------------------------------------------------------


def _network() -> nn.Module:
    config = ModelConfig(backbone="tiny", weights="none", checkpoint_activations=True)
    torch.manual_seed(0)
    return build_model(config, 3, features=False, micro_batches=2).train()


def _shown() -> tuple[Tensor, Tensor]:
    """Eight images, and what each pixel's logits are multiplied with in the loss."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return image, torch.randn(8, 3, 8, 8, generator=generator)


def _worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net = sync_batchnorm(_network())
    shared = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    image, factor = (each[4 * rank :][:4] for each in _shown())
    (shared(image).logits * factor).sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    torch.save((gradients, dict(net.named_buffers())), f"{store}.{rank}")
    dist.destroy_process_group()


def test_two_workers_learn_what_one_does(tmp_path: Path):
    """Statistics of batch norm are those of the same micro-batches, of all workers' images."""
    store = str(tmp_path / "store")
    mp.spawn(_worker, (store,), nprocs=2)  # type: ignore[attr-defined]
    one, two = (torch.load(f"{store}.{rank}", weights_only=True) for rank in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    alone, (image, factor) = _network(), _shown()
    (alone(image).logits * factor).sum().backward()
    for name, parameter in alone.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(2 * one[0][name], parameter.grad, rtol=1e-3, atol=1e-3, msg=name)
    for name, buffer in alone.named_buffers():
        torch.testing.assert_close(one[1][name], buffer, rtol=1e-4, atol=1e-5, msg=name)
