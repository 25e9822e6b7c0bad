"""PseudoSeg's calibrated fusion of two sources of pseudo-labels."""

import torch
from torch import Tensor

from pipeline.ops.world import World


def calibrated_fusion(decoder: Tensor, attention: Tensor, temperature: float, world: World) -> Tensor:
    """Soft pseudo-labels of two logit maps: brought to one scale, averaged, sharpened (paper eq. 3 and 4).

    Both are divided by the root mean square of all their values, over the images of all ranks, as their scales differ
    by nature; then q = (softmax z + softmax a) / 2 and q_c^(1/T) / sum.

    Args:
        decoder: float32 [B,C,h,w], logits z.
        attention: float32 [B,C,h,w], logits a.
        temperature: T, below 1 sharpens.
        world: ranks that share the scale.

    Returns:
        float32 [B,C,h,w], detached, sums to 1.
    """
    both = torch.stack([decoder, attention]).detach()
    square = world.sum(both.square().mean()) / world.size
    fused = (both * torch.rsqrt(square + 1e-8)).softmax(2).mean(0)
    return (fused.log() / temperature).softmax(1)
