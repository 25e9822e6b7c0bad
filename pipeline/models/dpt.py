"""The DPT decoder of plain vision transformers (Ranftl et al., ICCV 2021), in the sizes of the UniMatch V2 release."""

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models.parts import Decoder, Encoder, FeatureMaps
from pipeline.ops.grid import upsample


def widths(dim: int) -> tuple[list[int], int]:
    """Channels of the four reassembled maps, and of all fused ones, for tokens of `dim` channels."""
    if dim == 1024:
        return [256, 512, 1024, 1024], 256
    return [dim // 8, dim // 4, dim // 2, dim], dim // 6


class DPTDecoder(Decoder):
    """Four maps of one stride p become ones at p/4, p/2, p and 2p, and are fused from coarse to fine.

    It has no batch norm and no dropout. With a representation head the last fusion stays at p/4; without, as in the
    release, it doubles its resolution: 256 features at p/8 would be 90 MB for an image of 518x518.

    Args:
        config: feature_dim.
        encoder: gives channels and stride.
        num_classes: C.
        features: whether to add the representation head.
        aux: whether to add the auxiliary head, at the encoder's stride.

    Raises:
        UserError: the encoder's maps are not four of one stride.
    """

    def __init__(self, config: ModelConfig, encoder: Encoder, num_classes: int, *, features: bool, aux: bool) -> None:
        super().__init__()
        dims, stride = encoder.channels.all, encoder.strides.low
        if encoder.strides.all != [stride] * 4:
            raise UserError(
                f"model.decoder dpt: takes a plain vision transformer, and model.backbone {config.backbone} is none; "
                "pass --model.decoder auto"
            )
        outputs, width = widths(dims[0])
        self.stride = stride / (4 if features else 8)
        self.projections = nn.ModuleList(nn.Conv2d(dim, each, 1) for dim, each in zip(dims, outputs, strict=True))
        self.resizes = nn.ModuleList(
            [
                nn.ConvTranspose2d(outputs[0], outputs[0], 4, 4),
                nn.ConvTranspose2d(outputs[1], outputs[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(outputs[3], outputs[3], 3, 2, 1),
            ]
        )
        self.reduced = nn.ModuleList(nn.Conv2d(each, width, 3, padding=1, bias=False) for each in outputs)
        self.fusions = nn.ModuleList(Fusion(width, skip=number > 0) for number in range(4))
        self.classifier = _head(width, num_classes)
        hidden = nn.Conv2d(width, width, 1)
        self.representation = (
            nn.Sequential(hidden, nn.ReLU(), nn.Conv2d(width, config.feature_dim, 1)) if features else None
        )
        self.auxiliary = _head(dims[2], num_classes, width) if aux else None

    def fused(self, maps: FeatureMaps) -> Tensor:
        """[B,F,h,w] at the decoder's stride."""
        parts = zip(maps.levels, self.projections, self.resizes, self.reduced, strict=True)
        coarse_first = [reduce(resize(project(each))) for each, project, resize, reduce in parts][::-1]
        sizes = [(each.shape[2], each.shape[3]) for each in coarse_first]
        finest = sizes[-1] if self.representation is not None else (2 * sizes[-1][0], 2 * sizes[-1][1])
        x = None
        for fusion, each, size in zip(self.fusions, coarse_first, [*sizes[1:], finest], strict=True):
            x = fusion(each, x, size)
        assert x is not None
        return x


class Fusion(nn.Module):
    """A map and what was fused of the coarser ones, [B,F,h,w] each, to one at another size."""

    def __init__(self, width: int, *, skip: bool) -> None:
        """Args: width: F; skip: whether there are coarser maps."""
        super().__init__()
        self.own = ResidualUnit(width) if skip else None
        self.both = ResidualUnit(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, own: Tensor, coarser: Tensor | None, size: tuple[int, int]) -> Tensor:
        """The fused map, [B,F,*size]."""
        x = own if self.own is None or coarser is None else coarser + self.own(own)
        return self.out(upsample(self.both(x), size))


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions, each behind a ReLU, beside a shortcut: [B,F,h,w] to the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Adds the convolutions of `x` to `x`."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def _head(inputs: int, outputs: int, width: int = 0) -> nn.Sequential:
    """A 3x3 convolution, to `width` channels if that is set, ReLU, and a 1x1 convolution."""
    width = width or inputs
    return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, outputs, 1))
