"""GCT (Ke et al., ECCV 2020): two networks, and a detector of flaws that tells them which one to believe.

Of each network L_s + L_fc + L_dc; of the detector L_D. Code: ZHKKKe/PixelSSL (ssl_gct.py, the official one). Where it
alternates between networks and detector, one backward does: the networks see the detector with detached parameters,
the detector sees detached predictions, so each loss reaches its own parameters alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from pipeline.batch import Batch, Views, ViewSpec
from pipeline.config import Config
from pipeline.methods.base import BatchNorm, Losses, Method, Step
from pipeline.models import SegmentationModel, upsample
from pipeline.models.detector import FlawDetector
from pipeline.ops.flaws import exchange, flaw_target, handled
from pipeline.ops.masked import squared_error
from pipeline.ops.schedules import sigmoid_ramp
from pipeline.ops.world import World
from pipeline.typed import convert, require_positive, require_share


@dataclass(frozen=True, kw_only=True)
class GCTOptions:
    """GCT: two networks and a detector of flaws that picks between them. The defaults are the release's for VOC."""

    consistency: float = 100.0
    """Weight of the dynamic consistency after its rise (dc_ssl_scale)."""
    ramp: float = 0.11
    """Over which it rises: steps, or below 1 a share of the run (5 of 45 epochs)."""
    correction: float = 1.0
    """Weight of the flaw correction (fc_ssl_scale)."""
    detector: float = 10.0
    """Weight of the detector's loss (fd_scale)."""
    limit: float = 0.6
    """xi: a flaw above it is bad (dc_threshold)."""
    mu: float = 0.5
    """Weight of the error in the detector's target."""
    nu: int = 1
    """How often the target is dilated and blurred."""
    detector_lr: float = 1e-4
    """Learning rate of the detector's Adam at step 0; it follows the schedule of the run."""
    detector_width: int = 64
    """Channels of the detector's first layer; the last has eight times as many."""
    batch_norm: BatchNorm = "joint"
    """Whether labeled and unlabeled images share batch statistics (release: joint)."""

    def __post_init__(self) -> None:
        require_positive("gct", self, "detector_width")
        require_share("gct", self, "limit")


class GCT(Method):
    """Two networks that differ in their heads' initial weights, and the flaw detector."""

    Options = GCTOptions
    views = ViewSpec(unlabeled=True)
    durations = ("gct.ramp",)

    def __init__(self, config: Config, num_classes: int) -> None:
        options = convert(GCTOptions, config.methods.get("gct", {}), "gct")
        super().__init__(config, num_classes, options.batch_norm)
        self.options: GCTOptions = options
        self.left = self.build_network(features=False)
        self.right = self.build_network(features=False)
        self.detector = FlawDetector(3 + num_classes, self.options.detector_width)

    def networks(self) -> dict[str, SegmentationModel]:
        """Both; the release reports the left one first."""
        return {"left": self.left, "right": self.right}

    def trained(self) -> list[SegmentationModel]:
        """Both networks, with the optimiser of the run."""
        return [self.left, self.right]

    def param_groups(self) -> list[dict[str, object]]:
        """The detector has an Adam of its own: with SGD at the networks' rate it would hardly learn."""
        detector = {
            "params": list(self.detector.parameters()),
            "lr_mult": self.options.detector_lr / max(self.config.optim.lr, 1e-12),
            "optimizer": "adam",
            "betas": (0.9, 0.99),
            "weight_decay": 0.0,
        }
        return [*super().param_groups(), detector]

    def forward(self, batch: Batch, step: Step) -> Losses:
        """Both networks' losses and the detector's; unlabeled images count in L_fc and L_dc alone."""
        labeled, unlabeled = self.sides(batch)
        count, size = len(labeled.image), labeled.size
        images = torch.cat([labeled.image, unlabeled.image])
        valid = torch.cat([labeled.valid, unlabeled.valid])
        predictions = [self.together(network, labeled.image, unlabeled.image) for network in self.trained()]
        normal = self.left.normalise(images)
        pair = [upsample(prediction.logits.float(), size).softmax(1) for prediction in predictions]
        flaws = [self._frozen_detector(normal, probability) for probability in pair]
        exchanged = exchange(pair[0], pair[1], handled(flaws[0]), handled(flaws[1]), self.options.limit)

        ramp = sigmoid_ramp(step.index, self.steps(self.options.ramp))
        supervised = [self.supervised(prediction.of(slice(count)), labeled, step.world) for prediction in predictions]
        agreements = zip(pair, exchanged.targets, strict=True)
        consistency = [squared_error(own, target, valid, step.world, "valid") for own, target in agreements]
        correction = [_correction(flaw, exchanged.both_bad, valid, step.world) for flaw in flaws]
        detector = [self._detector_loss(labeled, normal[:count], own[:count], step.world) for own in pair]
        terms = {
            "supervised": torch.stack(supervised).sum(),
            "dynamic_consistency": self.options.consistency / self.num_classes * ramp * torch.stack(consistency).sum(),
            "flaw_correction": self.options.correction * torch.stack(correction).sum(),
            "flaw_detector": self.options.detector * torch.stack(detector).mean(),
        }
        return Losses(terms, {"both_bad": exchanged.both_bad.float().mean()})

    def _frozen_detector(self, normal: Tensor, probability: Tensor) -> Tensor:
        """The flaw map [B,1,H,W]; its gradient goes to the prediction and not to the detector."""
        frozen = {name: parameter.detach() for name, parameter in self.detector.named_parameters()}
        return functional_call(self.detector, frozen, (normal, probability)).float()

    def _detector_loss(self, labeled: Views, normal: Tensor, probability: Tensor, world: World) -> Tensor:
        """MSE between flaw map and the real flaws of the labeled images (paper eq. 2); for the detector alone."""
        target = flaw_target(probability, labeled.truth, self.options.mu, self.options.nu)
        return squared_error(self.detector(normal, probability.detach()), target, labeled.valid, world, "valid")


def _correction(flaw: Tensor, both_bad: Tensor, valid: Tensor, world: World) -> Tensor:
    """L_fc: mean of the squared flaw, 0 but for pixels that both networks get wrong (paper eq. 4)."""
    return squared_error(flaw * both_bad, torch.zeros_like(flaw), valid, world, "valid")
