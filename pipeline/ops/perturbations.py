"""Perturbations of a feature map [B,c,h,w] (Ouali et al., CVPR 2020, section 3.3).

Uniform numbers in [0,1) are given from outside, so that a step is a function of its seed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.boxes import Boxes, class_boxes, inside


def drop_channels(features: Tensor, draws: Tensor, rate: float) -> Tensor:
    """Spatial dropout: whole channels become 0, the others grow by 1/(1-rate), as with `torch.nn.Dropout2d`.

    Args:
        features: float [B,c,h,w].
        draws: float [B,c].
        rate: share that is dropped, below 1.
    """
    kept = (draws >= rate).to(features.dtype) / (1.0 - rate)
    return features * kept[..., None, None]


def scale_noise(features: Tensor, draws: Tensor, reach: float) -> Tensor:
    """F-Noise: f (1 + n) with n uniform in -reach..reach, drawn from float [c,h,w] and shared by the batch."""
    return features * (1.0 + reach * (2.0 * draws - 1.0))


def drop_salient(features: Tensor, draws: Tensor, low: float, high: float) -> Tensor:
    """F-Drop: keeps the cells whose channel mean is below a threshold, hiding the most active ones.

    Args:
        features: float [B,c,h,w].
        draws: float [1], place of the threshold between `low` and `high` times the image's largest mean.
        low: at least.
        high: at most.
    """
    attention = features.mean(1, keepdim=True)
    threshold = attention.amax((2, 3), keepdim=True) * (low + (high - low) * draws)
    return features * (attention < threshold)


def guided_cutout(label: Tensor, foreground: Tensor, draws: Tensor, share: float) -> Tensor:
    """G-Cutout: which cells stay, bool [B,h,w], when a part of each foreground class's box is cut out.

    The release cuts a part of the box of every connected contour, which needs the CPU. One box a class does without.

    Args:
        label: int64 [B,h,w], predicted classes.
        foreground: bool [B,C], which classes are objects.
        draws: float [B,C,2], place of the cut inside the box: top, left.
        share: height and width of the cut, relative to the box.
    """
    boxes = class_boxes(label, foreground.shape[1])
    height, width = (torch.floor(side * share).long() * foreground for side in (boxes.height, boxes.width))
    top = boxes.top + torch.floor(draws[..., 0] * (boxes.height - height + 1)).long()
    left = boxes.left + torch.floor(draws[..., 1] * (boxes.width - width + 1)).long()
    return ~inside(Boxes(top, left, height, width), (label.shape[1], label.shape[2])).any(1)


def adversarial(features: Tensor, head: Callable[[Tensor], Tensor], draws: Tensor, xi: float, epsilon: float) -> Tensor:
    """I-VAT: the features, moved by `epsilon` in the direction that changes the head's softmax most.

    One power step (Miyato et al., arXiv 1704.03976, eq. 13-15). The probe runs in float32 and its gradient is taken by
    `torch.func.grad`, which leaves the parameters' gradients alone.

    Args:
        features: float [B,c,h,w].
        head: features to logits [B,C,*,*], image by image.
        draws: float [B,c,h,w], start of the direction.
        xi: length of the probing step. The release's 1e-6 vanishes in float32: its direction comes out as 0.
        epsilon: length of the move, per image over all channels and cells.
    """
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        still = features.detach().float()
        reference = head(still).softmax(1)

        def distance(shift: Tensor) -> Tensor:
            return F.kl_div(head(still + xi * shift).log_softmax(1), reference, reduction="sum")

        direction = torch.func.grad(distance)(_unit(draws - 0.5))
    return features + epsilon * _unit(direction)


def _unit(x: Tensor) -> Tensor:
    """Each image's [c,h,w] at length 1; 0 stays 0."""
    norm = x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return x / norm.clamp_min(torch.finfo(x.dtype).tiny)
