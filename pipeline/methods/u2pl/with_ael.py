"""U2PL on AEL (Wang et al., CVPR 2022, table 3; code: Haochen-Wang409/U2PL, branch with_AEL).

L = L_AEL + lambda_c L_c. AEL as it is, but the most uncertain pixels of mixed images carry no pseudo-label; after
`contrast_start` steps U2PL's contrast joins. The sections `ael` and `u2pl` set the two parts. `docs/methods.md` says
which options of `u2pl` are read, and where we differ from the release.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pipeline.config.parse import require_share
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.methods.ael.ael import AEL, Task
from pipeline.methods.base import Losses, Step, untouched
from pipeline.methods.u2pl.fast import candidates, contrastive, positives
from pipeline.methods.u2pl.reference import Rule
from pipeline.methods.u2pl.u2pl import make_bank, make_draws, make_pixels, read_options
from pipeline.models import Prediction, upsample
from pipeline.ops.entropy import IGNORE, entropy, masked_quantile
from pipeline.ops.grid import shrink
from pipeline.ops.schedules import unreliable_share
from pipeline.ops.world import World


@dataclass(frozen=True, kw_only=True)
class U2PLAELOptions:
    """U2PL on AEL: its contrast joins AEL's losses.

    The defaults are the release's. Of the section u2pl it reads alpha_0, thresholds and the options of the contrast;
    docs/methods.md lists them.
    """

    # keys of the section u2pl that have no effect here; a flag that sets one is refused
    ignored: ClassVar[tuple[str, ...]] = (
        *("u2pl.variant", "u2pl.warmup", "u2pl.epoch_steps", "u2pl.ema_decay", "u2pl.teacher_passes", "u2pl.mix"),
        *("u2pl.mix_share", "u2pl.lambda_u", "u2pl.negative_pixels", "u2pl.prototype_ema", "u2pl.parts"),
        "u2pl.batch_norm",
    )
    contrast_start: float = 0.25
    """When the contrast joins: a number of steps, or below 1 a share of the run (release: 20 of 80 epochs; Cityscapes
    0.1)."""
    low: float = 0.2
    """Share of unlabeled pixels, those of the lowest entropy, that may be anchors and positives."""
    high: float = 0.8
    """From this quantile of the entropy on, unlabeled pixels may be negatives."""

    def __post_init__(self) -> None:
        require_share("u2pl_ael", self, "low", "high")
        if self.low > self.high:
            raise UserError(f"u2pl_ael.low {self.low}: must not be above u2pl_ael.high {self.high}")


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

    Options = U2PLAELOptions
    builds_on = ("ael", "u2pl")
    durations = (*AEL.durations, "u2pl_ael.contrast_start")
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

    @torch.no_grad()
    def _look(self, task: Task) -> Prediction:
        """The teacher's prediction, in evaluation mode, of the labeled and mixed images that the student sees."""
        return self.teacher.eval()(torch.cat([task.labeled.image, task.mixed]))

    def _thresholds(self, values: Tensor, known: Tensor, step: Step) -> _Thresholds:
        """The quantiles of the entropies `values` [B,H,W] where `known` [B,H,W] holds."""
        labeled = 1.0 - unreliable_share(step.index, step.total, self.u2pl.alpha_0)
        # a copy of a host tensor would wait
        shares = [torch.full((), share, device=values.device) for share in (self.own.low, self.own.high, labeled)]
        among = step.world if self.u2pl.thresholds == "global" else World()
        return _Thresholds(*masked_quantile(values, known, torch.stack(shares), among))
