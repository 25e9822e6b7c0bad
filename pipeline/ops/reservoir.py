"""A store of recent crops that can be asked for a class: what a stream offers instead of access by image id."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.ops.classes import draw_index
from pipeline.ops.world import World


class Drawn(NamedTuple):
    """Crops taken from the reservoir."""

    crops: Tensor
    """uint8 [B,K,H,W]."""
    label: Tensor
    """int64 [B], the class that each was drawn for."""
    found: Tensor
    """bool [B]; False: the reservoir is empty, and so is the crop."""


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
        """Takes up P crops of the global batch, each for a class drawn among those that it shows.

        Args:
            crops: uint8 [B,K,H,W] of this rank; B is the same on all ranks.
            shown: bool [B,C], which classes each crop can stand for.
            weights: float [C], how much each class is wanted.
            uniform: float [P,2] in [0,1), the same on all ranks: class and crop.
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

    def draw(self, weights: Tensor, uniform: Tensor) -> Drawn:
        """Crops of classes drawn by `weights` among those that have any.

        Args:
            weights: float [C].
            uniform: float [B,2] in [0,1): class and crop.
        """
        label = draw_index(weights * (self.count > 0), uniform[:, 0])
        held = self.count[label]
        slot = label * self.depth + torch.minimum((uniform[:, 1] * held).long(), (held - 1).clamp_min(0))
        return Drawn(self.crops[slot], label, held > 0)
