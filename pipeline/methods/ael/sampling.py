"""The sampling of AEL (Hu et al., NeurIPS 2021): class confidence, a reservoir of crops, and pastes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops.entropy import IGNORE
from pipeline.ops.world import World

# ---- which classes ----------------------------------------------------------------------------------------------


class ClassConfidence(nn.Module):
    """Running mean of the probability of the true class, by class; the same on every rank.

    State (buffer): `value` float32 [C], in 0..1. It starts at 1/2, which favours no class; the release draws it from
    U(0,1).
    """

    value: Tensor

    def __init__(self, classes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.full((classes,), 0.5))

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor, world: World) -> None:
        """c_k <- m c_k + (1-m) mean of p_k over the pixels of class k on all ranks; absent classes stay (AEL eq. 6).

        Args:
            logits: float [B,C,H,W].
            target: int64 [B,H,W], 255 ignored.
            world: ranks that share the mean.
        """
        classes = len(self.value)
        label = torch.where(target == IGNORE, classes, target).flatten()
        picked = logits.float().softmax(1).gather(1, target.clamp_max(classes - 1).unsqueeze(1)).flatten()
        sums = torch.zeros(2, classes + 1, device=logits.device)
        sums.index_add_(1, label, torch.stack([picked, torch.ones_like(picked)]))
        total, count = world.sum(sums)[:, :classes]
        moved = self.momentum * self.value + (1.0 - self.momentum) * total / count.clamp_min(1.0)
        self.value.copy_(torch.where(count > 0, moved, self.value))

    def sampling_rate(self) -> Tensor:
        """r_k = (1 - c_k) / max_j (1 - c_j), 1 for the class of least confidence: float32 [C] (AEL eq. 8)."""
        rest = 1.0 - self.value
        return rest / rest.amax().clamp_min(1e-12)

    def preference(self, power: float = 1.0) -> Tensor:
        """Weights to draw classes by, softmax of (1 - c)^power: float32 [C], summing to 1 (AEL eq. 7)."""
        return (1.0 - self.value).clamp_min(0.0).pow(power).softmax(0)


def draw_index(weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices drawn in proportion to their weights, with replacement.

    Args:
        weights: float [N] >= 0.
        uniform: float of any shape in [0,1).

    Returns:
        int64 of that shape; any index if all weights are 0.
    """
    cumulative = weights.float().cumsum(0)
    index = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    return index.clamp_max(len(weights) - 1)


# ---- which crops ------------------------------------------------------------------------------------------------


class DrawnCrops(NamedTuple):
    """Crops drawn from the reservoir."""

    crops: Tensor
    """uint8 [B,K,H,W]."""
    label: Tensor
    """int64 [B], the class that each crop was drawn for."""
    found: Tensor
    """bool [B]; False where the reservoir was empty, and the crop is all 0."""


class Reservoir(nn.Module):
    """First in, first out, `depth` crops for each class; the same on every rank.

    A few crops of the global batch enter per step; they travel to all ranks. That costs one small collective and makes
    the content independent of the number of ranks, and a resume exact.

    State (buffers): `crops` uint8 [C*depth + 1, K, H, W], whose last row takes what is thrown away, `pointer` and
    `count` int64 [C].
    """

    crops: Tensor
    pointer: Tensor
    count: Tensor

    def __init__(self, classes: int, depth: int, planes: int, size: tuple[int, int]) -> None:
        """Args: classes: C; depth: crops per class; planes: K of a crop; size: H, W of a crop."""
        super().__init__()
        self.depth = depth
        self.register_buffer("crops", torch.zeros(classes * depth + 1, planes, *size, dtype=torch.uint8))
        self.register_buffer("pointer", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def push(self, crops: Tensor, shown: Tensor, weights: Tensor, uniform: Tensor, world: World) -> None:
        """Stores P crops of the global batch, each for a class drawn among those that it shows.

        Args:
            crops: uint8 [B,K,H,W] of this rank; B is the same on all ranks.
            shown: bool [B,C], which classes each crop can stand for.
            weights: float [C] >= 0, by which classes are drawn.
            uniform: float [P,2] in [0,1), the same on all ranks; decide class and crop.
            world: ranks that share the crops.
        """
        everyone = world.gather(shown).flatten(0, 1).float()  # [W*B,C]
        label = draw_index(weights * everyone.amax(0), uniform[:, 0])  # [P]
        showing = everyone.index_select(1, label)  # [W*B,P]; an index of one number would wait for the device
        chosen = torch.stack([draw_index(*one) for one in zip(showing.unbind(1), uniform[:, 1].unbind(), strict=True)])
        place = chosen - world.rank * len(crops)
        mine = (place >= 0) & (place < len(crops))
        sent = crops[place.clamp(0, len(crops) - 1)] * mine.view(-1, 1, 1, 1)
        wanted = showing.amax(0) > 0
        for crop, k, use in zip(world.sum(sent).split(1), label.split(1), wanted.split(1), strict=True):
            self._put(crop, k, use)

    def _put(self, crop: Tensor, label: Tensor, wanted: Tensor) -> None:
        """Replaces the oldest crop of a class, if `wanted`; uint8 [1,K,H,W], int64 [1], bool [1]."""
        slot = torch.where(wanted, label * self.depth + self.pointer[label], len(self.crops) - 1)
        self.crops.index_copy_(0, slot, crop)
        is_class = (torch.arange(len(self.count), device=label.device) == label) & wanted
        self.pointer.copy_((self.pointer + is_class) % self.depth)
        self.count.copy_((self.count + is_class).clamp_max(self.depth))

    def draw(self, weights: Tensor, uniform: Tensor) -> DrawnCrops:
        """Crops of classes drawn by `weights` among those that have any.

        Args:
            weights: float [C] >= 0, by which classes are drawn.
            uniform: float [B,2] in [0,1); decide class and crop.
        """
        label = draw_index(weights * (self.count > 0), uniform[:, 0])
        held = self.count[label]
        slot = label * self.depth + torch.minimum((uniform[:, 1] * held).long(), (held - 1).clamp_min(0))
        return DrawnCrops(self.crops[slot], label, held > 0)


# ---- pastes -----------------------------------------------------------------------------------------------------


def zoomed(image: Tensor, mask: Tensor, draws: Tensor, zoom: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Every image at a random size, place and side, on a canvas of the old size.

    Args:
        image: uint8 [B,3,H,W].
        mask: int64 [B,H,W].
        draws: float [B,4] in [0,1): zoom, top, left, flip.
        zoom: smallest and largest size, relative to the canvas; below 1 the image shrinks, above 1 it is cut.

    Returns:
        uint8 [B,3,H,W] (bilinear, from an image of about the new size) and int64 [B,H,W] (nearest), which is 255
        outside the image.
    """
    scale = zoom[0] + (zoom[1] - zoom[0]) * draws[:, 0]
    centre = (2.0 * draws[:, 1:3] - 1.0) * (1.0 - scale).unsqueeze(1)  # y, x on a canvas of -1..1
    side = torch.where(draws[:, 3] < 0.5, -1.0, 1.0) / scale
    zero = torch.zeros_like(scale)
    row_x = torch.stack([side, zero, -centre[:, 1] * side], 1)
    row_y = torch.stack([zero, 1.0 / scale, -centre[:, 0] / scale], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(image.shape), align_corners=False)
    pasted = _sampled(image.float(), grid, scale)
    known = F.grid_sample((mask - IGNORE).unsqueeze(1).float(), grid, mode="nearest", align_corners=False)
    return pasted.round().to(torch.uint8), known.squeeze(1).long() + IGNORE


def _sampled(image: Tensor, grid: Tensor, scale: Tensor) -> Tensor:
    """Bilinear samples of the image at 1, 1/2 or 1/4 of its size, whichever is next above `scale`: no aliasing."""
    found = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
    for step in (2, 4):
        small = F.avg_pool2d(image, step, ceil_mode=True, count_include_pad=False)
        coarse = F.grid_sample(small, grid, mode="bilinear", padding_mode="border", align_corners=False)
        found = torch.where((scale * step <= 1.0).view(-1, 1, 1, 1), coarse, found)
    return found
