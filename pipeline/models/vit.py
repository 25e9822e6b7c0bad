"""Vision transformers as encoders (Dosovitskiy et al., ICLR 2021), in the sizes of DINOv2 (arXiv 2304.07193).

State dicts of DINOv2 without registers, official or timm's, fit as they are. `vit_tiny` is ours, for tests and CPUs.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.schema import ModelConfig
from pipeline.models.parts import Encoder, FeatureMaps, Levels, at_multiple
from pipeline.models.timm_networks import download
from pipeline.models.weights import load_weights


@dataclass(frozen=True)
class Size:
    """One transformer."""

    dim: int
    """D, channels of a token."""
    depth: int
    """Number of blocks."""
    heads: int
    """Of each attention."""
    taps: tuple[int, int, int, int]
    """The blocks, from 0 on, whose tokens become feature maps."""
    patch: int = 14
    """Pixels of a side of a patch."""
    grid: int = 37
    """Patches of a side that there are position embeddings for; DINOv2's last phase saw 518 pixels."""
    timm: str = ""
    """timm's name of its weights."""


SIZES = {
    "vit_tiny": Size(96, 4, 3, (0, 1, 2, 3), patch=8, grid=8),
    "dinov2_vits14": Size(384, 12, 6, (2, 5, 8, 11), timm="vit_small_patch14_dinov2.lvd142m"),
    "dinov2_vitb14": Size(768, 12, 12, (2, 5, 8, 11), timm="vit_base_patch14_dinov2.lvd142m"),
    "dinov2_vitl14": Size(1024, 24, 16, (4, 11, 17, 23), timm="vit_large_patch14_dinov2.lvd142m"),
}
"""Blocks as in the UniMatch V2 release: every fourth of S and B."""
UNUSED = ("mask_token", "head.")
"""Prefixes of what DINOv2's files hold beside the encoder: the token of its masked pretraining, a classifier."""


def build(config: ModelConfig) -> "ViT":
    """The transformer that `config` names, with its weights.

    Raises:
        UserError: the weights cannot be had or do not fit.
    """
    size = SIZES[config.backbone]
    encoder = ViT(size)
    downloads = {"timm": lambda _: download(size.timm)} if size.timm else {}
    encoder.weights_digest = load_weights(encoder, config.backbone, config.weights, UNUSED, downloads)
    return encoder


class ViT(Encoder):
    """Tokens of four blocks, each normalised by the last layer norm, as maps [B,D,H/patch,W/patch] of one stride.

    An image whose sides are no multiples of the patch is resized to the nearest ones, as UniMatch V2 does to score.
    """

    embeddings = ("cls_token", "pos_embed")

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.channels = Levels(*[size.dim] * 4)
        self.strides = Levels(*[size.patch] * 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + size.grid**2, size.dim))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, size.dim, size.patch, size.patch)))
        self.blocks = nn.ModuleList(Block(size.dim, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.dim, eps=1e-6)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> FeatureMaps:
        """The four maps, in the order of the blocks: low, between, mid, high."""
        patch = self.size.patch
        x = at_multiple(x, patch)
        height, width = (side // patch for side in x.shape[2:])
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + resized_positions(
            self.pos_embed, (height, width)
        )
        maps = []
        for number, block in enumerate(self.blocks):
            x = self.run(block, x)
            if number in self.size.taps:
                maps.append(self.norm(x[:, 1:]).transpose(1, 2).unflatten(2, (height, width)))
        low, between, mid, high = maps
        return FeatureMaps(low, mid, high, between)

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict whose position embeddings, where they are of another grid, are resized to that of this one."""
        state, grid = dict(state), self.size.grid
        found = state.get("pos_embed")
        if found is not None and found.dim() == 3 and _side(found) not in (0, grid):
            state["pos_embed"] = resized_positions(found, (grid, grid))
        return state

    def layers(self) -> list[list[nn.Parameter]]:
        """The embeddings, each block, and with the last block the norm behind it."""
        first = [self.cls_token, self.pos_embed, *self.patch_embed.parameters()]
        blocks = [list(block.parameters()) for block in self.blocks]
        return [first, *blocks[:-1], blocks[-1] + list(self.norm.parameters())]


class Block(nn.Module):
    """Attention and an MLP on [B,N,D], each behind a layer norm, scaled by channel, and added to its input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """[B,N,D] to the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Self-attention of all tokens, [B,N,D] to the same shape."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """By torch's fused kernel."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A factor for each channel, 1 at first, as in DINOv2's published networks."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B,N,D] to the same shape."""
        return x * self.gamma


def resized_positions(embeddings: Tensor, size: tuple[int, int]) -> Tensor:
    """Position embeddings at another grid: bicubic, without antialiasing, as DINOv2 does but for an offset of 0.1.

    At their own grid they come out bit for bit.

    Args:
        embeddings: float [1,1+g*g,D]: the class token's, then those of a square of patches, row by row.
        size: height and width of the new grid.

    Returns:
        [1,1+height*width,D].
    """
    side = _side(embeddings)
    square = embeddings[:, 1:].float().transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(square, size=size, mode="bicubic", align_corners=False)
    return torch.cat([embeddings[:, :1], resized.flatten(2).transpose(1, 2).to(embeddings.dtype)], 1)


def _side(embeddings: Tensor) -> int:
    """Patches of a side of the square that [1,1+g*g,D] are for; 0 if they are for no square."""
    side = round((embeddings.shape[1] - 1) ** 0.5)
    return side if side**2 + 1 == embeddings.shape[1] else 0
