"""What FixMatch and its successors can be told; as `pipeline.config.options`, which lists them."""

from dataclasses import dataclass

from pipeline.config.parse import require_share
from pipeline.config.schema import BatchNorm
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FixMatchOptions:
    """FixMatch: confident labels of the weak view supervise the strong one. The defaults are UniMatch's for VOC."""

    lambda_u: float = 1.0
    """Weight of L_u (release: 1)."""
    threshold: float = 0.95
    """Least probability of a pseudo-label (release: VOC 0.95, Cityscapes 0)."""
    cutmix: float = 0.5
    """Probability that an image is mixed."""
    batch_norm: BatchNorm = "joint"
    """Whether labeled and weak unlabeled images share batch statistics; strong ones never do (release: joint)."""

    def __post_init__(self) -> None:
        require_share("fixmatch", self, "threshold", "cutmix")


@dataclass(frozen=True, kw_only=True)
class UniMatchOptions:
    """UniMatch V1: FixMatch with two strong views and perturbed features. The defaults are the release's for VOC."""

    threshold: float = 0.95
    """Least probability of a pseudo-label (release: VOC 0.95, Cityscapes 0)."""
    cutmix: float = 0.5
    """Probability that a strong view is mixed."""
    dropout: float = 0.5
    """Probability that a feature channel of the perturbed stream is dropped."""
    lambda_s: float = 0.5
    """Weight of the mean loss of the two strong views."""
    lambda_fp: float = 0.5
    """Weight of the loss of the perturbed features."""
    batch_norm: BatchNorm = "joint"
    """Whether labeled and weak unlabeled images share batch statistics; strong ones never do (release: joint)."""

    def __post_init__(self) -> None:
        require_share("unimatch", self, "threshold", "cutmix", "dropout")
        if self.dropout == 1:
            raise UserError("unimatch.dropout 1: must be below 1")


@dataclass(frozen=True, kw_only=True)
class UniMatchV2Options:
    """UniMatch V2: two strong views with parted channels learn from a teacher. Defaults: the release's for VOC."""

    threshold: float = 0.95
    """Least probability of a pseudo-label (release: VOC 0.95, Cityscapes 0)."""
    cutmix: float = 0.5
    """Probability that a strong view is mixed."""
    dropout: float = 0.5
    """Share of the unlabeled images whose channels are parted between their two strong views."""
    lambda_u: float = 1.0
    """Weight of the mean loss of the two strong views (release: 1)."""
    ema_decay: float = 0.996
    """Largest decay of the EMA teacher."""
    batch_norm: BatchNorm = "separate"
    """Whether labeled and strong unlabeled images share batch statistics (release: separate; its network has none)."""

    def __post_init__(self) -> None:
        require_share("unimatch_v2", self, "threshold", "cutmix", "dropout", "ema_decay")
