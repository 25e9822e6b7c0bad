"""How well each class is known, and draws among classes that depend on it (Hu et al., NeurIPS 2021: AEL)."""

import torch
from torch import Tensor, nn

from pipeline.ops.entropy import IGNORE
from pipeline.ops.world import World


class ClassConfidence(nn.Module):
    """Running mean of the probability of the true class, by class; the same on every rank.

    State (buffer): `value` float32 [C]. It starts at 1/2, which favours no class; the release draws it from U(0,1).
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
        """r_k = (1 - c_k) / max_j (1 - c_j): the worst class is always learned from, float32 [C] (AEL eq. 8)."""
        doubt = 1.0 - self.value
        return doubt / doubt.amax().clamp_min(1e-12)

    def preference(self, power: float = 1.0) -> Tensor:
        """Shares by softmax of (1 - c)^power: weak classes are drawn more often, float32 [C] (AEL eq. 7)."""
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
