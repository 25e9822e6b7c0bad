"""Regions of images and channels of features that are replaced or dropped: CutMix, ClassMix, CutOut, channel dropout.

All of it runs on the device. Random numbers in [0,1) are arguments, so that a step is a function of its seed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# ---- boxes ------------------------------------------------------------------------------------------------------


class Boxes(NamedTuple):
    """Rectangles in whole pixels: integers or floats, all four of one shape. Height and width are 0 where none is."""

    top: Tensor
    """First row."""
    left: Tensor
    """First column."""
    height: Tensor
    """Number of rows."""
    width: Tensor
    """Number of columns."""


def inside(boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """Which pixels of images of `size` lie in each box; boxes may reach beyond the image: [...] -> bool [...,H,W]."""
    rows = _within(boxes.top, boxes.height, size[0])
    columns = _within(boxes.left, boxes.width, size[1])
    return rows[..., :, None] & columns[..., None, :]


def _within(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Which of `size` pixels lie in an interval: [...] -> bool [...,size]."""
    pixel = torch.arange(size, device=start.device)
    return (pixel >= start[..., None]) & (pixel < (start + length)[..., None])


# ---- boxes around classes ---------------------------------------------------------------------------------------


def class_boxes(label: Tensor, classes: int) -> Boxes:
    """The smallest box around all pixels of each class: int64 [B,C].

    Args:
        label: int64 [B,H,W]; values from `classes` on belong to no class.
        classes: C.
    """
    member = label.unsqueeze(1) == torch.arange(classes, device=label.device).view(1, -1, 1, 1)
    top, height = _extent(member.any(3))
    left, width = _extent(member.any(2))
    return Boxes(top, left, height, width)


def _extent(hit: Tensor) -> tuple[Tensor, Tensor]:
    """First index, and length up to the last, of the True entries along the last axis; 0 and 0 where there are none."""
    length = hit.shape[-1]
    index = torch.arange(length, device=hit.device)
    first = torch.where(hit, index, length).amin(-1)
    last = torch.where(hit, index, -1).amax(-1)
    return torch.where(last < 0, 0, first), (last - first + 1).clamp_min(0)


# ---- drawn boxes: bool [B,H,W], True inside ---------------------------------------------------------------------


def box_masks(draws: Tensor, size: tuple[int, int], area: tuple[float, float]) -> Tensor:
    """Boxes of the given area and any aspect (French et al., mask_gen.py; CPS uses three of them).

    Each of N boxes takes a share a ~ U(area) of the image, divided by N: its height is a^u of the image's and its width
    a^(1-u), both divided by sqrt(N). It lies inside the image. Where boxes overlap they cancel out.

    Args:
        draws: float [B,N,4] in [0,1): area, aspect u, top and left.
        size: H, W of the images.
        area: smallest and largest share of the image that N boxes take together.
    """
    share = area[0] + (area[1] - area[0]) * draws[..., 0]
    scale = draws.shape[1] ** -0.5
    height, width = share ** draws[..., 1] * scale, share ** (1 - draws[..., 1]) * scale
    return inside(_placed(height, width, draws[..., 2:], size), size).sum(1) % 2 == 1


def small_box_masks(draws: Tensor, size: tuple[int, int]) -> Tensor:
    """One box of 2-40 % of the image and aspect H:W of 0.3-3.3 (UniMatch, dataset/transform.py).

    UniMatch draws again until the box lies inside, which favours small ones. Here a side longer than the image is cut.

    Args:
        draws: float [B,4] in [0,1): area, aspect, top and left.
        size: H, W of the images.
    """
    area = 0.02 + 0.38 * draws[:, 0]
    aspect = 0.3 + (1 / 0.3 - 0.3) * draws[:, 1]
    height, width = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
    return inside(_placed(height, width, draws[:, 2:], size), size)


def _placed(height: Tensor, width: Tensor, place: Tensor, size: tuple[int, int]) -> Boxes:
    """Boxes of given sizes, placed inside the image.

    Args:
        height: float [...], share of the image's height in 0..1; rounded to whole pixels.
        width: float [...], share of the image's width.
        place: float [...,2] in [0,1), top and left among the places where the box fits.
        size: H, W of the images.
    """
    height, width = (height * size[0]).round(), (width * size[1]).round()
    top, left = (
        (u * (side - length + 1)).floor().minimum(side - length)
        for u, side, length in zip(place.unbind(-1), size, (height, width), strict=True)
    )
    return Boxes(top, left, height, width)


def cutout(draws: Tensor, size: tuple[int, int], share: float) -> Tensor:
    """CutOut: one box centred at any pixel, bool [B,H,W]; the part outside the image is cut off.

    Args:
        draws: float [B,2] in [0,1), centre of the box: y and x.
        size: H, W of the images.
        share: height and width of the box, relative to the image's.
    """
    height, width = (max(1, round(share * side)) for side in size)
    top = (draws[:, 0] * size[0]).floor() - height // 2
    left = (draws[:, 1] * size[1]).floor() - width // 2
    return inside(Boxes(top, left, torch.full_like(top, height), torch.full_like(left, width)), size)


# ---- mixing -----------------------------------------------------------------------------------------------------


def partners(count: int, device: torch.device) -> Tensor:
    """The partner of each image in the batch, whose pixels it takes: int64 [count].

    Neighbours swap (0 with 1, 2 with 3), so the pairs do not depend on how the global batch is cut over ranks. In an
    odd batch each image takes from the next one instead, as in the release of U2PL.
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
    """ClassMix: the pixels of a random half of the classes in each image stay, the others are replaced.

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


# ---- dropout ----------------------------------------------------------------------------------------------------


def drop_channels(features: Tensor, draws: Tensor, rate: float) -> Tensor:
    """Spatial dropout: whole channels become 0, the others grow by 1/(1-rate), as with `torch.nn.Dropout2d`.

    Args:
        features: float [B,c,h,w].
        draws: float [B,c] in [0,1).
        rate: share of the channels that is dropped, below 1.
    """
    factor = (draws >= rate).to(features.dtype) / (1.0 - rate)
    return features * factor[..., None, None]
