from functools import partial

import pytest
import torch

from pipeline.config.backbones import BACKBONES
from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models import Prediction, Scale, build_model, upsample

FEW = ["tiny", "mobilenet_v2", "resnet18", "vit_tiny"]
"""One of each family."""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small(backbone: str = "mobilenet_v2", **changes) -> ModelConfig:
    values = {"weights": "none", "width": 16, "feature_dim": 8, **changes}
    return ModelConfig(backbone=backbone, **values)  # type: ignore[arg-type]


def images(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)


def shapes(prediction: Prediction) -> list[tuple[int, ...] | None]:
    return [None if part is None else tuple(part.shape) for part in prediction]


@pytest.mark.parametrize(("size", "quarter", "eighth"), [(97, 25, 13), (321, 81, 41), (513, 129, 65), (50, 13, 7)])
def test_odd_sizes(size, quarter, eighth):
    model = build_model(small(), 5, features=True, aux=True).train()
    expected = [(1, 5, quarter, quarter), (1, 8, quarter, quarter), (1, 5, eighth, eighth)]
    assert shapes(model(images(1, size, size))) == expected


@pytest.mark.parametrize("backbone", FEW)
def test_logits_alone_cost_no_other_head(backbone):
    model = build_model(small(backbone), 5, features=True, aux=True).eval()
    image, read = images(2, 65, 97), []
    expected = model(image).logits
    for head in (model.decoder.representation, model.decoder.auxiliary):
        head.register_forward_hook(lambda *_: read.append("head"))  # type: ignore[operator, union-attr]
    assert torch.equal(model.logits(image), expected)
    assert not read
    model(image)
    assert read == ["head", "head"]


@pytest.mark.parametrize("backbone", FEW)
def test_activations_are_channels_last_from_end_to_end(backbone):
    """A layer that gets another layout copies its input, in forward and backward, and so do those after it."""
    model, others = build_model(small(backbone), 5, features=True, aux=True).train(), []

    def look(name: str, _: object, inputs: tuple[torch.Tensor, ...]) -> None:
        if not inputs[0].is_contiguous(memory_format=torch.channels_last):
            others.append(name)

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.BatchNorm2d):
            layer.register_forward_pre_hook(partial(look, name))
    for part in model(images(2, 65, 97)):
        look("output", None, (part,))
    assert others == []


def test_heads_are_optional():
    model = build_model(small(), 5, features=False)
    assert shapes(model(images(2, 65, 97))) == [(2, 5, 17, 25), None, None]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("stride", [8, 16])
def test_every_backbone_and_stride_at_full_size(backbone, stride):
    """On the meta device: shapes without arithmetic, and no value may be read by the host."""
    with torch.device("meta"):
        config = small(backbone, output_stride=stride, width=256, feature_dim=256)
        model = build_model(config, 21, features=True, aux=True)
        prediction = model(torch.zeros(2, 3, 513, 769, dtype=torch.uint8))
        aux = prediction.aux
    if BACKBONES[backbone].decoder != "deeplab":
        sizes = {"tiny": (257, 385), "vit_tiny": (256, 384)}.get(backbone, (148, 220))
        assert shapes(prediction)[:2] == [(2, 21, *sizes), (2, 256, *sizes)]
        assert 513 / sizes[0] == pytest.approx(model.decoder.stride, rel=0.02)
    else:
        assert shapes(prediction)[:2] == [(2, 21, 129, 193), (2, 256, 129, 193)]
        assert aux is not None
        assert aux.shape[2:] == ((65, 97) if stride == 8 else (33, 49))


@pytest.mark.parametrize("backbone", FEW)
def test_parameter_groups_are_disjoint_and_complete(backbone):
    model = build_model(small(backbone), 5, features=True, aux=True)
    encoder = {id(p) for p in model.encoder_parameters()}
    heads = {id(p) for p in model.head_parameters()}
    assert encoder
    assert heads
    assert encoder == {id(p) for layer in model.encoder.layers() for p in layer}
    assert not encoder & heads
    assert encoder | heads == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("backbone", FEW)
def test_a_batch_of_one_trains_every_parameter(backbone):
    model = build_model(small(backbone, dropout=0.0), 5, features=True, aux=True).train()
    sum(part.square().mean() for part in model(images(1, 65, 65))).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_resnet101_has_the_size_of_the_paper():
    with torch.device("meta"):
        model = build_model(small("resnet101", width=256, feature_dim=256), 21, features=True)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(64.5e6, rel=0.01)
    assert sum(p.numel() for p in model.encoder_parameters()) == pytest.approx(42.6e6, rel=0.01)


def test_the_graph_has_no_breaks():
    model = build_model(small("tiny"), 3, features=True, aux=True).train()
    image = images(2, 40, 48)
    traced = torch.compile(model, backend="eager", fullgraph=True)(image)
    assert [part.shape for part in traced] == [part.shape for part in model(image)]


def test_tiny_is_tiny():
    model = build_model(small("tiny", feature_dim=64), 6, features=True)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.3e6, rel=0.1)
    assert shapes(model(images(2, 64, 64))) == [(2, 6, 32, 32), (2, 64, 32, 32), None]


def test_tiny_learns_a_picture():
    model = build_model(small("tiny"), 3, features=False).train()
    mask = torch.zeros(2, 32, 32, dtype=torch.long)
    mask[:, 8:20, 8:20], mask[:, 22:30, 4:28] = 1, 2
    picture = (torch.tensor([[30, 90, 200], [200, 40, 90], [90, 200, 30]])[mask]).permute(0, 3, 1, 2).byte()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(upsample(model(picture).logits, (32, 32)), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.nn.functional.cross_entropy(upsample(model(picture).logits, (32, 32)), mask) < 0.15


def test_normalisation_is_inside():
    model = build_model(small(), 5, features=False)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 33, 33))
    assert seen[0].abs().max() < 0.01
    assert not any(key in ("mean", "std") for key in model.state_dict())


@pytest.mark.parametrize("bands", [1, 12])
@pytest.mark.parametrize("backbone", [*FEW, "timm/resnet10t"])
def test_a_grey_image_in_all_bands_gives_what_it_gives_as_rgb(backbone, bands):
    """So pretrained weights stay of use whatever the bands are."""
    torch.manual_seed(1)
    rgb = build_model(small(backbone), 5, features=True).eval()
    scale = Scale((110.0,) * bands, (50.0,) * bands)
    other = build_model(small(backbone), 5, features=True, scale=scale).eval()
    first = next(name for name, value in other.encoder.state_dict().items() if value.dim() == 4)
    weights = dict(rgb.state_dict())
    adapted = weights[f"encoder.{first}"].mean(1, keepdim=True).repeat(1, bands, 1, 1) * 3 / bands
    other.load_state_dict({**weights, f"encoder.{first}": adapted})
    grey = images(2, 64, 64)[:, :1]
    with torch.no_grad():
        found = other.decoder(other.encoder((grey.repeat(1, bands, 1, 1) - 110.0) / 50.0)).logits
        expected = rgb.decoder(rgb.encoder(((grey - 110.0) / 50.0).repeat(1, 3, 1, 1))).logits
        assert torch.equal(other(grey.repeat(1, bands, 1, 1)).logits, found)
    assert torch.allclose(found, expected, atol=1e-4)
    torch.manual_seed(1)
    drawn = build_model(small("resnet18"), 5, features=False).encoder.state_dict()["low.0.0.weight"]
    torch.manual_seed(1)
    taken = build_model(small("resnet18"), 5, features=False, scale=scale).encoder.state_dict()["low.0.0.weight"]
    assert torch.allclose(taken, (drawn.mean(1, keepdim=True) * 3 / bands).expand(-1, bands, -1, -1))


def test_upsample_aligns_corners():
    x = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    assert torch.equal(upsample(x, (3, 3))[0, 0], torch.tensor([[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]]))


def test_tiny_with_weights_is_a_user_error():
    with pytest.raises(UserError, match=r"model.weights torchvision: tiny has no pretrained weights"):
        build_model(small("tiny", weights="torchvision"), 5, features=False)
