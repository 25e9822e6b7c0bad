"""CutMix and ClassMix on the device: a part of every image is replaced by the same part of its partner."""

import torch
from torch import Tensor

from pipeline.ops.boxes import Boxes, inside


def partners(count: int, device: torch.device) -> Tensor:
    """Who lends pixels to whom inside the batch: int64 [count].

    Neighbours swap (0 with 1, 2 with 3), so a pair stays together however the global batch is cut over ranks; an odd
    batch shifts by one instead, as upstream does.
    """
    index = torch.arange(count, device=device)
    return index ^ 1 if count % 2 == 0 else (index + 1) % count


def cutmix_masks(draws: Tensor, size: tuple[int, int]) -> Tensor:
    """One box per image that covers half of its area.

    Args:
        draws: float [B,3] in [0,1): width, top and left of the box.
        size: H, W of the images.

    Returns:
        bool [B,H,W], True inside the box (the partner's pixels). Widths are uniform on (W/2, W), the height follows
        from the area, the place is uniform (upstream augmentation.py, generate_cutout_mask).
    """
    height, width = size
    low = width // 2 + 1
    box_w = low + torch.floor(draws[:, 0] * max(width - low, 1))
    box_h = torch.round(height * width / 2 / box_w)
    top = torch.floor(draws[:, 1] * (height - box_h + 1))
    left = torch.floor(draws[:, 2] * (width - box_w + 1))
    return inside(Boxes(top, left, box_h, box_w), size)


def classmix_masks(draws: Tensor, label: Tensor) -> Tensor:
    """The pixels of a random half of the classes in each image stay, the others are replaced.

    Args:
        draws: float [B,C] in [0,1): the classes with the smallest numbers stay.
        label: int64 [B,H,W], pseudo-labels; 255 is replaced.

    Returns:
        bool [B,H,W], True where the partner's pixels come in. Of n classes present floor(n/2) stay (upstream
        augmentation.py, generate_class_mask).
    """
    batch, classes = draws.shape
    flat = label.flatten(1)
    present = torch.zeros(batch, 256, device=label.device).scatter(1, flat, 1.0)[:, :classes] > 0
    rank = torch.where(present, draws, 2.0).argsort(1).argsort(1)
    stays = torch.zeros(batch, 256, dtype=torch.bool, device=label.device)
    stays[:, :classes] = rank < present.sum(1, keepdim=True) // 2
    return ~stays.gather(1, flat).view_as(label)


def mix(own: Tensor, mask: Tensor, partner: Tensor) -> Tensor:
    """`own` with the partner's values where `mask` holds.

    Args:
        own: [B,H,W] or [B,K,H,W], any dtype.
        mask: bool [B,H,W].
        partner: int64 [B], index of each image's partner in the unmixed batch.
    """
    return torch.where(mask if own.dim() == 3 else mask.unsqueeze(1), own[partner], own)
