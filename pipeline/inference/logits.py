"""Logits at native size: of the whole image at once, or window by window."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.batch import PADDING_COLOUR
from pipeline.ops.grid import upsample


def whole(model: nn.Module, image: Tensor, scale: float = 1.0) -> Tensor:
    """Logits of whole images, at their own size.

    Args:
        model: maps uint8 images [B,3,H,W] to logits [B,C,h,w] of any resolution.
        image: uint8 [B,3,H,W].
        scale: resize before the network, > 0.

    Returns:
        float32 logits [B,C,H,W].
    """
    size = (image.shape[2], image.shape[3])
    return upsample(model(at_scale(image, scale)).float(), size)


def sliding(
    model: nn.Module,
    image: Tensor,
    window: tuple[int, int],
    scale: float = 1.0,
    colour: Sequence[int] = PADDING_COLOUR,
) -> Tensor:
    """Logits of images window by window, averaged where windows overlap.

    Windows start every two thirds of their size; the last ones are moved back to end at the border. An image that
    is smaller than a window is padded with the mean colour below and to the right, for the network only.

    Args:
        model: as for `whole`.
        image: uint8 [B,3,H,W].
        window: height and width, in pixels of the resized image.
        scale: resize before the network, > 0.
        colour: of padding, for each band 0..255.

    Returns:
        float32 logits [B,C,H,W].
    """
    scaled = at_scale(image, scale)
    height, width = scaled.shape[2:]
    padded = _padded(scaled, window, colour)
    total, count = None, torch.zeros(padded.shape[2:], device=image.device)
    for cell in _cells(padded.shape[2], padded.shape[3], window):
        logits = upsample(model(padded[cell]).float(), window)
        if total is None:  # only now is the number of classes known
            total = logits.new_zeros(*logits.shape[:2], *padded.shape[2:])
        total[cell] += logits
        count[cell] += 1
    assert total is not None  # there is always a window
    logits = (total / count)[..., :height, :width]
    return logits if scale == 1.0 else upsample(logits, (image.shape[2], image.shape[3]))


def averaged(logits: Callable[..., Tensor], image: Tensor, scales: Sequence[float], *, mirror: bool) -> Tensor:
    """Class probabilities, averaged over several looks at an image.

    Args:
        logits: `whole` or `sliding` of a network; called with the image and `scale`.
        image: uint8 [B,3,H,W].
        scales: one look each, > 0.
        mirror: look at the mirror image too.

    Returns:
        float32 [B,C,H,W], summing to 1 over C.
    """

    def looks() -> Iterator[Tensor]:
        for scale in scales:
            yield logits(image, scale=scale).softmax(1)
            if mirror:
                yield logits(image.flip(3), scale=scale).softmax(1).flip(3)

    return reduce(torch.add, looks()) / (len(scales) * (1 + mirror))


def combined(logits: Callable[..., Tensor], image: Tensor, scales: Sequence[float], *, mirror: bool) -> Tensor:
    """Logits of several looks in one: their softmax is what `averaged` gives. Of a single look they are its own.

    Takes what `averaged` does.

    Returns:
        float32 [B,C,H,W].
    """
    if len(scales) == 1 and not mirror:
        return logits(image, scale=scales[0])
    return averaged(logits, image, scales, mirror=mirror).clamp_min(1e-30).log()


def _cells(height: int, width: int, window: tuple[int, int]) -> list[tuple[Any, ...]]:
    """Indices of the windows of [...,height,width], which is at least as large as one."""
    tops, lefts = _starts(height, window[0]), _starts(width, window[1])
    return [(..., slice(y, y + window[0]), slice(x, x + window[1])) for y in tops for x in lefts]


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin along one axis."""
    stride = -(-2 * window // 3)
    return [*range(0, length - window, stride), length - window]


def _padded(image: Tensor, window: tuple[int, int], padding: Sequence[int]) -> Tensor:
    """`image` enlarged to at least `window`."""
    batch, _, height, width = image.shape
    size = (max(height, window[0]), max(width, window[1]))
    if size == (height, width):
        return image
    colour = torch.tensor(padding, dtype=torch.uint8, device=image.device)
    padded = colour.view(1, -1, 1, 1).repeat(batch, 1, *size)
    padded[..., :height, :width] = image
    return padded


def _times(side: int, scale: float) -> int:
    """`round(side * scale)`, a half to the even number, with integers alone: exported programs know no other way."""
    above, below = Fraction(scale).limit_denominator(100_000).as_integer_ratio()
    twice = 2 * side * above
    return (twice + below - 1 + twice // (2 * below) % 2) // (2 * below)


def at_scale(image: Tensor, scale: float) -> Tensor:
    """`image` resized as bytes, so that the network sees what a resized file would show."""
    if scale == 1.0:
        return image
    size = [max(1, _times(side, scale)) for side in image.shape[2:]]
    resized = F.interpolate(image.float(), size=size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
