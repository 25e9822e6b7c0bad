"""Entropy, pseudo-labels and cross entropy at the pixels of a label, from logits of a coarser resolution.

`FullGrid` resizes the logits (bilinear, corners aligned) and serves every size. `QuarterGrid` gives the same numbers
without making logits at full size. It serves labels that are exactly four times finer: crops of 4m+1 pixels, such as
U2PL's 513 and 769.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.entropy import IGNORE, entropy
from pipeline.ops.kernel import is_active, kernel


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes float maps [B,C,h,w] to [B,C,*size]: bilinear, corners aligned, as everywhere in U2PL."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def shrink(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour reduction to `size`: source index floor(i*H/h) on both axes, any dtype, [B,H,W] -> [B,h,w]."""
    rows, columns = _sources(values.shape[-2:], size, values.device)
    return values[:, rows][:, :, columns]


def _sources(large: tuple[int, ...], small: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column that each row and column of the small map is taken from, int64 [h] and [w]: floor(i*H/h)."""
    rows, columns = (torch.arange(few, device=device) * many // few for many, few in zip(large, small, strict=True))
    return rows, columns


class Grid(ABC):
    """The pixels of labels [B,H,W] whose logits are [B,C,h,w]. Values by pixel are [B,...], in the grid's own order."""

    def __init__(self, size: tuple[int, int], small: tuple[int, int]) -> None:
        """Args: size: H, W of labels; small: h, w of logits."""
        self.size, self.small = size, small

    @abstractmethod
    def arrange(self, label: Tensor) -> Tensor:
        """Integer labels [B,H,W] in the grid's order, of any dtype; places that are no pixel are 255."""

    @abstractmethod
    def shrink(self, values: Tensor) -> Tensor:
        """Values in the grid's order, any dtype, at the resolution of the logits: [B,h,w], as the function `shrink`."""

    @abstractmethod
    def label(self, logits: Tensor) -> Tensor:
        """The likeliest class of each pixel: int64 [B,H,W]."""

    @abstractmethod
    def entropy(self, logits: Tensor) -> Tensor:
        """Entropy of the softmax at each pixel: float32 in the grid's order, natural logarithm."""

    @abstractmethod
    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy summed over the pixels that are not 255: float32, 0-dim; has a gradient.

        Args:
            logits: float [B,C,h,w].
            target: class ids in the grid's order.
        """


class FullGrid(Grid):
    """Logits at full size; the grid's order is the image's."""

    @staticmethod
    def of(label: Tensor) -> "FullGrid":
        """The grid of labels [B,H,W] whose logits are of the same size."""
        size = (label.shape[1], label.shape[2])
        return FullGrid(size, size)

    def arrange(self, label: Tensor) -> Tensor:
        """`label` itself: the grid's order is that of the image."""
        return label

    def shrink(self, values: Tensor) -> Tensor:
        """[B,H,W] to [B,h,w] by the function `shrink`."""
        return shrink(values, self.small)

    def label(self, logits: Tensor) -> Tensor:
        """Argmax over the classes of the resized logits: int64 [B,H,W]."""
        return self._full(logits).argmax(1)

    def entropy(self, logits: Tensor) -> Tensor:
        """Entropy of the softmax of the resized logits: float32 [B,H,W]."""
        return entropy(self._full(logits))

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of the resized logits, summed over the pixels that are not 255: float32, 0-dim."""
        return F.cross_entropy(self._full(logits), target, ignore_index=IGNORE, reduction="sum")

    def _full(self, logits: Tensor) -> Tensor:
        return logits.float() if self.size == self.small else upsample(logits.float(), self.size)


class QuarterGrid(Grid):
    """Labels four times finer than logits: H = 4(h-1)+1. The order is [B,h,16,w].

    Cell (i,j) has the 16 pixels (4i+k, 4j+l), k and l in 0..3, at index 4k+l; those beyond the image are no pixels.
    Over a cell a bilinear function is a + kp + lq + klr, so its exponential is E P^k Q^l R^kl: four exponentials and a
    product per pixel in place of sixteen exponentials and a resize.
    """

    def arrange(self, label: Tensor) -> Tensor:
        """Labels as float32 [B,h,16,w], 255 where a cell reaches beyond the image."""
        (h, w), batch = self.small, len(label)
        padded = label.new_full((batch, 4 * h, 4 * w), IGNORE, dtype=torch.float32)  # compared to floats: vectorises
        padded[:, : self.size[0], : self.size[1]] = label
        return padded.view(batch, h, 4, w, 4).transpose(3, 4).reshape(batch, h, 16, w)

    def shrink(self, values: Tensor) -> Tensor:
        """[B,h,16,w] to [B,h,w]: the pixels of the function `shrink`, looked up by cell and place in it."""
        rows, columns = _sources(self.size, self.small, values.device)
        row, phase = (rows // 4)[:, None], (rows % 4 * 4)[:, None] + columns % 4
        return values[:, row, phase, columns // 4]

    def label(self, logits: Tensor) -> Tensor:
        """As `FullGrid`, up to ties in the last bit."""
        (h, w), batch = self.small, len(logits)
        likeliest = _argmax if logits.is_cuda else _likeliest
        cells = likeliest(_corners(logits, -math.inf)).view(batch, h, 4, 4, w).transpose(3, 4)
        return cells.reshape(batch, 4 * h, 4 * w)[:, : self.size[0], : self.size[1]].long()

    def entropy(self, logits: Tensor) -> Tensor:
        """Entropy, float32 [B,h,16,w], within 3e-6 of `FullGrid`."""
        return _entropy(_corners(logits))

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """As `FullGrid`, with the gradient computed in the same pass."""
        return _QuarterCrossEntropy.apply(logits, target)  # type: ignore[no-any-return]


def make_grid(size: tuple[int, int], small: tuple[int, int]) -> Grid:
    """The fastest grid for labels of `size` and logits of `small`: the quarter grid where it serves and is compiled.

    Uncompiled it would be slower than the full one.
    """
    exact = all(large - 1 == 4 * (few - 1) for large, few in zip(size, small, strict=True))
    return (QuarterGrid if exact and is_active() else FullGrid)(size, small)


# ---- the quarter grid's passes over the cells ------------------------------------------------------------------

_LN2 = math.log(2.0)
_FLOOR = -120.0
"""Least log2 probability: keeps the products of a cell's exponentials inside float32. It has an effect
only between corners that favour different classes, each by more than a factor of 2^120."""


@torch.no_grad()
def _corners(logits: Tensor, floor: float = _FLOOR) -> Tensor:
    """log2 of the softmax, [B,C,h,w] -> float32 [B,h+1,C,w+1] with the last row and column repeated.

    A constant added to all classes of one corner leaves the softmax of interpolated pixels alone, so this may stand
    for the logits; being <= 0, it needs no maximum before the exponential. Classes lie inside rows: the passes below
    sum over them.
    """
    batch, classes, h, w = logits.shape
    log2 = (logits.float().log_softmax(1) * (1.0 / _LN2)).clamp_min_(floor).transpose(1, 2)
    padded = log2.new_empty(batch, h + 1, classes, w + 1)
    padded[:, :h, :, :w] = log2
    padded[:, h, :, :w] = log2[:, h - 1]
    padded[..., w] = padded[..., w - 1]
    return padded


def _plane(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, p, q, r of every cell: float32 [B,h,C,w] each."""
    a, right, below, across = x[:, :-1, :, :-1], x[:, :-1, :, 1:], x[:, 1:, :, :-1], x[:, 1:, :, 1:]
    return a, (below - a) / 4, (right - a) / 4, (across - below - right + a) / 16


def _exponentials(x: Tensor) -> list[Tensor]:
    """2^x at the 16 pixels of each cell, by products: 16 of float32 [B,h,C,w]."""
    row, down, step, bend = (torch.exp2(term) for term in _plane(x))
    found = []
    for _ in range(4):
        value = row
        for _ in range(4):
            found.append(value)
            value = value * step
        row, step = row * down, step * bend
    return found


def _values(x: Tensor) -> list[Tensor]:
    """The interpolated values of x at the 16 pixels of each cell: 16 of float32 [B,h,C,w]."""
    a, p, q, r = _plane(x)
    return [a + k * p + m * (q + k * r) for k in range(4) for m in range(4)]


@kernel(one_pass=True)
def _entropy(x: Tensor) -> Tensor:
    """H = ln s - t/s with s = sum_c e and t = sum_c e ln e: float32 [B,h,16,w]."""
    found = []
    for e, value in zip(_exponentials(x), _values(x), strict=True):
        total = e.sum(2)
        found.append((total.log2() - (e * value).sum(2) / total) * _LN2)
    return torch.stack(found, 2).clamp_min(0.0)


@kernel(one_pass=True, contract=False)  # a maximum rounded otherwise would be found nowhere
def _likeliest(x: Tensor) -> Tensor:
    """Argmax over the classes: float32 [B,h,16,w]. On CPUs a maximum and a comparison vectorise better than an argmax.

    Where no class equals the maximum, as beside a NaN, it is the last one.
    """
    last = x.shape[2] - 1
    classes = torch.arange(last + 1, device=x.device, dtype=x.dtype).view(-1, 1)
    best = [torch.where(value >= value.amax(2, keepdim=True), classes, last).amin(2) for value in _values(x)]
    return torch.stack(best, 2)


@kernel(one_pass=True)  # Triton rounds as it likes: each value is made once, for one reduction
def _argmax(x: Tensor) -> Tensor:
    """As `_likeliest`, for GPUs: int64 [B,h,16,w]."""
    return torch.stack([value.argmax(2) for value in _values(x)], 2)


@kernel(one_pass=True)
def _normalisers(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """1/s, s the sum of a pixel's exponentials, or 0 where the target is 255: float32 [B,h,16,w]; and sum of log2 s."""
    total = torch.stack([e.sum(2) for e in _exponentials(x)], 2)
    counts = (target != IGNORE).float()
    return counts / total, (counts * total.log2()).sum()


@kernel(one_pass=True)
def _corner_gradients(x: Tensor, target: Tensor, inverse: Tensor) -> tuple[list[Tensor], Tensor]:
    """Softmax minus one-hot, weighted bilinearly to the four corners of each cell: 4 of float32 [B,h,C,w].

    The last output, float32 [B,h,C,w], is the sum over the pixels of a cell of the log2 probability, not yet normalised
    by s, of their target class.
    """
    classes = torch.arange(x.shape[2], device=x.device, dtype=x.dtype).view(-1, 1)
    found, scored = [torch.zeros((), device=x.device)] * 4, torch.zeros((), device=x.device)
    a, p, q, r = _plane(x)
    values = _exponentials(x)
    for k in range(4):
        left = right = hits = places = torch.zeros((), device=x.device)
        for m in range(4):
            index = 4 * k + m
            hit = (target[:, :, index, None] == classes).float()
            error = values[index] * inverse[:, :, index, None] - hit
            left, right = left + error * (1 - m / 4), right + error * (m / 4)
            hits, places = hits + hit, places + hit * m
        scored = scored + hits * (a + k * p) + places * (q + k * r)
        weights = (1 - k / 4, 1 - k / 4, k / 4, k / 4)
        found = [
            total + part * weight
            for total, part, weight in zip(found, (left, right, left, right), weights, strict=True)
        ]
    return found, scored


class _QuarterCrossEntropy(torch.autograd.Function):
    """Loss and gradient in one pass; the gradient already includes the adjoint of the resize."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """Summed cross entropy, 0-dim. Saves its gradient for the logits, [B,C,h,w] in their dtype."""
        x = _corners(logits)
        inverse, log_total = _normalisers(x, target)
        (top_left, top_right, low_left, low_right), scored = _corner_gradients(x, target, inverse)
        # the repeated row and column get nothing: only places that are no pixels reach them
        gradient = top_left
        gradient[..., 1:] += top_right[..., :-1]
        gradient[:, 1:] += low_left[:, :-1]
        gradient[:, 1:, :, 1:] += low_right[:, :-1, :, :-1]
        ctx.save_for_backward(gradient.transpose(1, 2).to(logits.dtype))
        return (log_total - scored.sum()) * _LN2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The saved gradient times that of the loss; the target gets none."""
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None
