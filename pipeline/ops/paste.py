"""Images zoomed and moved on the device, to be pasted into others."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.entropy import IGNORE


def zoomed(image: Tensor, mask: Tensor, draws: Tensor, zoom: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Every image at a random size, place and side, on a canvas of the old size.

    Args:
        image: uint8 [B,3,H,W].
        mask: int64 [B,H,W].
        draws: float [B,4] in [0,1): zoom, top, left, flip.
        zoom: smallest and largest; below 1 the image shrinks, above it is cut.

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
