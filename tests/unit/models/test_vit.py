from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models import build_model
from pipeline.models.vit import SIZES, ViT, resized_positions

SMALL = replace(SIZES["vit_tiny"], patch=14, grid=5)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _vit(**changes: int) -> ViT:
    return ViT(replace(SMALL, **changes)).eval()


@pytest.mark.parametrize(("name", "parameters"), [("vits", 22.1e6), ("vitb", 86.6e6), ("vitl", 304.4e6)])
def test_the_sizes_are_those_of_dinov2(name, parameters):
    """Table 17 of its paper: 21, 86 and 300 million; with the position embeddings as here in its released files."""
    size = SIZES[f"dinov2_{name}14"]
    with torch.device("meta"):
        encoder = ViT(size)
        maps = encoder(torch.zeros(1, 3, 518, 280))
    assert sum(each.numel() for each in encoder.parameters()) == pytest.approx(parameters, rel=0.002)
    assert [tuple(each.shape) for each in maps.levels] == [(1, size.dim, 37, 20)] * 4
    assert size.taps[-1] == size.depth - 1


@pytest.mark.parametrize("grid", [(5, 5), (7, 4)])
def test_the_maps_are_timms(grid):
    """On the same random weights."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_small_patch14_dinov2", img_size=(14 * grid[0], 14 * grid[1])).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    size = replace(SIZES["dinov2_vits14"], grid=5)
    ours = ViT(size).eval()
    ours.load_state_dict({**theirs.state_dict(), "pos_embed": ours.pos_embed.data})
    theirs.pos_embed.data = resized_positions(
        ours.pos_embed.data, grid
    )  # timm's own way antialiases; DINOv2's does not
    image = torch.randn(2, 3, 14 * grid[0], 14 * grid[1], generator=generator)
    with torch.no_grad():
        found = ours(image).levels
        wanted = theirs.forward_intermediates(image, indices=list(size.taps), norm=True, intermediates_only=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_positions_of_the_own_grid_stay_bit_for_bit():
    embeddings = torch.randn(1, 26, 8)
    assert torch.equal(resized_positions(embeddings, (5, 5)), embeddings)


def test_positions_are_resized_as_a_picture():
    """A plane stays about one inside (torch's curve bends it a little), the class token's stays, rows come first."""
    rows = torch.arange(8.0).repeat_interleave(8)
    embeddings = torch.stack([rows, rows.view(8, 8).T.flatten()], 1)
    found = resized_positions(torch.cat([torch.full((1, 2), 9.0), embeddings])[None], (4, 16))
    assert found.shape == (1, 65, 2)
    assert (found[:, 0] == 9).all()
    inside = found[0, 1:].view(4, 16, 2)[1:3, 4:12]
    torch.testing.assert_close(inside[..., 0], torch.tensor([2.5, 4.5])[:, None].expand(2, 8), rtol=0.0, atol=0.05)
    torch.testing.assert_close(inside[..., 1], (torch.arange(4.0, 12.0) / 2 - 0.25).expand(2, 8), rtol=0.0, atol=0.05)


def test_an_image_between_patches_is_resized_to_the_nearest():
    encoder = _vit()
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 62, 76)).high.shape[2:] == (4, 5)
        assert encoder(torch.randn(1, 3, 64, 3)).high.shape[2:] == (5, 1)


def test_layers_are_all_parameters_by_depth():
    encoder = _vit()
    layers = encoder.layers()
    assert len(layers) == 1 + SMALL.depth
    assert {id(each) for layer in layers for each in layer} == {id(each) for each in encoder.parameters()}
    assert layers[0][0] is encoder.cls_token
    assert layers[-1][-1] is encoder.norm.bias


# ---- weights ----------------------------------------------------------------------------------------------------


def _official(grid: int) -> dict[str, Tensor]:
    """A state dict as DINOv2's files have it: with a mask token."""
    state = ViT(replace(SIZES["vit_tiny"], grid=grid)).state_dict()
    return {**state, "mask_token": torch.zeros(1, 96)}


def _load(source: str) -> ViT:
    network = build_model(ModelConfig(backbone="vit_tiny", weights=source, feature_dim=8), 3, features=False)
    assert isinstance(network.encoder, ViT)
    return network.encoder


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_fills_it(suffix, tmp_path):
    state, file = _official(8), str(tmp_path / f"dino.{suffix}")
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    encoder = _load(file)
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    assert len(encoder.weights_digest) == 16
    assert _load("none").weights_digest == ""


def test_positions_of_another_grid_are_resized(tmp_path):
    state, file = _official(5), str(tmp_path / "dino.pth")
    torch.save(state, file)
    assert torch.equal(_load(file).pos_embed, resized_positions(state["pos_embed"], (8, 8)))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("pos_embed", torch.zeros(1, 30, 96), r"pos_embed has shape \[1, 30, 96\], expected \[1, 65, 96\]"),
        ("pos_embed", torch.zeros(1, 26, 48), r"pos_embed has shape \[1, 65, 48\], expected \[1, 65, 96\]"),
        ("blocks.1.attn.qkv.weight", torch.zeros(3, 96), r"blocks\.1\.attn\.qkv\.weight has shape \[3, 96\], expected"),
        ("blocks.9.attn.qkv.weight", torch.zeros(3, 96), r"blocks\.9\.attn\.qkv\.weight is unexpected; .* vit_tiny\?"),
        ("cls_token", None, r"cls_token is missing; is this a state dict of vit_tiny\?"),
    ],
)
def test_what_does_not_fit_is_named(key, value, words, tmp_path):
    state = {**_official(8), key: value}
    torch.save({name: each for name, each in state.items() if each is not None}, tmp_path / "dino.pth")
    with pytest.raises(UserError, match=rf"dino\.pth: {words}"):
        _load(str(tmp_path / "dino.pth"))


def test_weights_that_nobody_has(tmp_path):
    with pytest.raises(UserError, match=r"model\.weights torchvision: has none of vit_tiny; choose from none, or pass"):
        _load("torchvision")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a\.safetensors: damaged, or no safetensors"):
        _load(str(tmp_path / "a.safetensors"))
