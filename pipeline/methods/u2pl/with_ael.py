"""U2PL on AEL (Wang et al., CVPR 2022, table 3; code: Haochen-Wang409/U2PL, branch with_AEL).

L = L_AEL + lambda_c L_c. AEL as it is, but the most uncertain pixels of mixed images carry no pseudo-label; after
`contrast_start` steps U2PL's contrast joins. The sections `ael` and `u2pl` set the two parts. `docs/methods.md` says
which options of `u2pl` are read, and where we differ from the release.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config.options import U2PLAELOptions
from pipeline.config.schema import Config
from pipeline.methods.ael.ael import AEL, Task
from pipeline.methods.base import Losses, Partition, Step, untouched
from pipeline.methods.u2pl.fast import candidates, contrastive, positives
from pipeline.methods.u2pl.reference import Rule
from pipeline.methods.u2pl.u2pl import make_bank, make_draws, make_pixels, read_options, unlikely
from pipeline.models import Prediction, upsample
from pipeline.ops.entropy import IGNORE, entropy, masked_quantile, quantile
from pipeline.ops.grid import shrink
from pipeline.ops.schedules import unreliable_share
from pipeline.ops.world import World


class _Thresholds(NamedTuple):
    """Quantiles of the entropy of this step's mixed images; float32, 0-dim, NaN without any pixel."""

    anchor_up_to: Tensor
    """Pixels up to this entropy may be anchors and positives."""
    negative_from: Tensor
    """Pixels from this entropy on may be negatives."""
    label_below: Tensor
    """Pixels below this entropy carry a pseudo-label."""


class U2PLAEL(AEL):
    """AEL's networks with representation heads, and a memory bank."""

    features = True

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.own = config.options_of(U2PLAELOptions)
        self.u2pl = read_options(config, num_classes)
        self.bank = make_bank(self.u2pl, config, num_classes)

    def losses(self, student: Prediction, task: Task, step: Step) -> Losses:
        """AEL's losses with fewer pseudo-labels, and from `contrast_start` on lambda_c L_c."""
        teacher = self._look(task)
        values = entropy(upsample(teacher.logits[len(task.labeled.image) :].float(), task.labeled.size))
        known = task.of_mixed.confidence > 0
        at = self._thresholds(values, known, step)
        certain = task.of_mixed._replace(confidence=task.of_mixed.confidence * (values < at.label_below))
        losses = super().losses(student, task._replace(of_mixed=certain), step)
        if step.index < self.steps(self.own.contrast_start):
            return Losses({**losses.terms, "contrastive": untouched(student)}, losses.logs)

        label = task.of_mixed.label.masked_fill(~known, IGNORE)
        small, seen = (shrink(x, (student.logits.shape[-2], student.logits.shape[-1])) for x in (values, known))
        may_be_anchor, may_be_negative = seen & (small <= at.anchor_up_to), seen & (small >= at.negative_from)
        pixels = make_pixels(student, teacher, task.labeled.truth, label, may_be_anchor, may_be_negative)
        draws = make_draws(self.u2pl, step, self.num_classes, label.device)
        found = candidates(pixels, Rule(self.u2pl.delta_p, self.u2pl.r_l, self.u2pl.r_h), draws)
        distance = contrastive(
            pixels, found, positives(found, step.world), self.bank, draws, self.u2pl.temperature, step.world,
            binary=self.u2pl.loss == "binary",
        )  # fmt: skip
        logs = {"anchors": found.anchor_count, "negatives": found.negative_count}
        return Losses(
            {**losses.terms, "contrastive": self.u2pl.lambda_c * distance},
            {**losses.logs, **logs, "bank_fill": self.bank.count / self.bank.size},
        )

    def partition(self, logits: Tensor, step: Step) -> Partition:
        """Reliable: an entropy below that of `alpha_0`'s share. Negatives: from the quantile `high` on, as U2PL's."""
        values = entropy(logits)
        below, high = (quantile(values, torch.tensor(share)) for share in (self._labeled(step), self.own.high))
        return Partition(values < below, (values >= high)[:, None] & unlikely(logits, self.u2pl))

    def stored_keys(self) -> list[Tensor]:
        """The keys in the memory bank."""
        return self.bank.held()

    def _labeled(self, step: Step) -> float:
        """Share of the mixed pixels that keep their pseudo-label."""
        return 1.0 - unreliable_share(step.index, step.total, self.u2pl.alpha_0)

    @torch.no_grad()
    def _look(self, task: Task) -> Prediction:
        """The teacher's prediction, in evaluation mode, of the labeled and mixed images that the student sees."""
        return self.teacher.eval()(torch.cat([task.labeled.image, task.mixed]))

    def _thresholds(self, values: Tensor, known: Tensor, step: Step) -> _Thresholds:
        """The quantiles of the entropies `values` [B,H,W] where `known` [B,H,W] holds."""
        shares = (self.own.low, self.own.high, self._labeled(step))
        placed = [torch.full((), share, device=values.device) for share in shares]  # a copy of a host tensor would wait
        among = step.world if self.u2pl.thresholds == "global" else World()
        return _Thresholds(*masked_quantile(values, known, torch.stack(placed), among))
