"""What the methods can be told: one frozen dataclass each, one docstring per field.

They stand apart from the methods, which need torch: a flag is checked, and help is shown, before torch is imported.
Where a value is of a release or a paper, it says so.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pipeline.config.parse import require_positive, require_share
from pipeline.config.schema import BatchNorm
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SupOnlyOptions:
    """SupOnly: the supervised baseline, trained on the labeled images alone. It has no options of its own."""


@dataclass(frozen=True, kw_only=True)
class SelfTrainingOptions:
    """Self-training, the student: learns from labels made beforehand. The defaults are ST's, of the ST++ release."""

    strong: bool = True
    """Change the colours of pseudo-labeled images and cut holes into them (ST); false: plain weak views."""
    cutout: float = 0.5
    """Probability of a hole in a strong view (release: 0.5)."""
    tta: bool = True
    """Label by probabilities averaged over five scales and mirror images, as the release does; false: of the image
    as it is."""
    keep: float = 1.0
    """Share of each image's pixels that get a label, the most certain ones (release: all)."""
    batch_norm: BatchNorm = "joint"
    """Whether labeled and pseudo-labeled images share batch statistics (release: joint, one list of both)."""

    def __post_init__(self) -> None:
        require_share("self_training", self, "cutout", "keep")


@dataclass(frozen=True, kw_only=True)
class MeanTeacherOptions:
    """Mean Teacher: the student agrees with its moving average. The weight is TorchSemiSeg's, the ramp PixelSSL's."""

    lambda_u: float = 100.0
    """Weight of the consistency loss (TorchSemiSeg 100 on probabilities; PixelSSL 1 on logits)."""
    ramp: float = 0.0625
    """Length of the weight's rise: steps, or below 1 a share of the run (PixelSSL: 5 epochs, here of 80); 0: none."""
    ema_decay: float = 0.99
    """Largest decay of the EMA teacher (TorchSemiSeg, PixelSSL)."""
    on_logits: bool = False
    """Compare logits instead of probabilities (PixelSSL)."""
    input_noise: float = 0.0
    """Deviation of Gaussian noise on the student's unlabeled images, in grey levels of 0..255 (PixelSSL: 0)."""
    batch_norm: BatchNorm = "separate"
    """Whether labeled and unlabeled images share batch statistics (TorchSemiSeg: separate; PixelSSL: joint)."""

    def __post_init__(self) -> None:
        require_share("mean_teacher", self, "ema_decay")


@dataclass(frozen=True, kw_only=True)
class CutMixSegOptions:
    """CutMix-Seg: Mean Teacher on images mixed of two. The defaults are the release's for PASCAL VOC and Cityscapes."""

    lambda_u: float = 1.0
    """Weight of the consistency loss (release: cons_weight 1, no ramp)."""
    threshold: float = 0.97
    """Teacher probability from which a pixel counts as confident (release: conf_thresh)."""
    ema_decay: float = 0.99
    """Largest decay of the EMA teacher (release: teacher_alpha)."""
    strong: bool = True
    """Change the colours of the student's images (release since 2021; false: as in its first version)."""
    batch_norm: BatchNorm = "separate"
    """Whether labeled and unlabeled images share batch statistics (release: separate, on VOC frozen: --freeze_bn)."""

    def __post_init__(self) -> None:
        require_share("cutmix_seg", self, "threshold", "ema_decay")


@dataclass(frozen=True, kw_only=True)
class CCTOptions:
    """CCT: auxiliary decoders of perturbed features agree with the main one.

    One auxiliary decoder per perturbation; other defaults as in the release's config or the paper (said).
    """

    # the perturbations: each has an option of its name, the number of its decoders
    kinds: ClassVar = ("dropout", "feature_noise", "feature_drop", "cutout", "context", "objects", "adversarial")
    weight: float = 30.0
    """Weight of the consistency loss after its rise (release: unsupervised_w)."""
    ramp: float = 0.1
    """Length of the weight's rise: steps, or below 1 a share of the run (release: rampup_ends)."""
    dropout: int = 1
    """Decoders that see spatial dropout (release: 6)."""
    feature_noise: int = 1
    """Decoders that see multiplicative noise (release: 6)."""
    feature_drop: int = 1
    """Decoders that miss the most active cells (release: 6)."""
    cutout: int = 1
    """Decoders that miss a part of every object (release: 6)."""
    context: int = 1
    """Decoders that see objects alone, without their context (release: 2)."""
    objects: int = 1
    """Decoders that see the background alone, without objects (release: 2)."""
    adversarial: int = 1
    """Decoders that see the most harmful shift, VAT (release: 2)."""
    dropout_rate: float = 0.5
    """Share of channels that dropout zeroes."""
    noise: float = 0.3
    """Largest noise of feature_noise, relative to the feature."""
    drop_low: float = 0.7
    """Least threshold of feature_drop, relative to the highest activity (paper; the release has 0.6)."""
    drop_high: float = 0.9
    """Largest threshold of feature_drop."""
    erase: float = 0.4
    """Height and width of a cutout, relative to the object's box."""
    xi: float = 1.0
    """Length of the probing step of VAT (release: 1e-6, at which float32 gives no direction at all)."""
    epsilon: float = 2.0
    """Length of the adversarial shift, over a whole feature map."""
    batch_norm: BatchNorm = "separate"
    """Whether labeled and unlabeled images share batch statistics (release: separate)."""

    def __post_init__(self) -> None:
        require_positive("cct", self, "xi")
        require_share("cct", self, "dropout_rate", "drop_low", "drop_high", "erase")
        if not any(getattr(self, kind) for kind in self.kinds) or self.dropout_rate == 1.0:
            raise UserError("cct: needs an auxiliary decoder, and a dropout_rate below 1")


@dataclass(frozen=True, kw_only=True)
class GCTOptions:
    """GCT: two networks and a flaw detector that picks between them. The defaults are the release's for VOC."""

    consistency: float = 100.0
    """Weight of the dynamic consistency after its rise (dc_ssl_scale)."""
    ramp: float = 0.11
    """Length of that rise: steps, or below 1 a share of the run (5 of 45 epochs)."""
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
    """Base learning rate of the detector's Adam, reached after the warm-up; it follows the schedule of the run."""
    detector_width: int = 64
    """Channels of the detector's first layer; the last has eight times as many."""
    batch_norm: BatchNorm = "joint"
    """Whether labeled and unlabeled images share batch statistics (release: joint)."""

    def __post_init__(self) -> None:
        require_positive("gct", self, "detector_width")
        require_share("gct", self, "limit")


@dataclass(frozen=True, kw_only=True)
class CPSOptions:
    """CPS: two networks label each other's images. The defaults are the release's for PASCAL VOC with CutMix."""

    cutmix: bool = True
    """Label clean unlabeled images and learn from mixed ones; false: cross supervision of all images as they are."""
    lambda_cps: float = 1.0
    """Weight of the cross supervision (release: VOC 1 with CutMix, 1.5 without; Cityscapes 5 and 6)."""
    batch_norm: BatchNorm = "separate"
    """Whether labeled and unlabeled images share batch statistics (release: separate)."""


@dataclass(frozen=True, kw_only=True)
class PseudoSegOptions:
    """PseudoSeg: labels from decoder and class activation maps. The defaults are the release's for PASCAL VOC."""

    weight: float = 1.0
    """Weight of the consistency loss (unlabeled_weight)."""
    head_weight: float = 1.0
    """Weight of L_att and L_cls (release: 1); 0 with weight 0 is SupOnly."""
    temperature: float = 0.5
    """T: below 1 the fused pseudo-labels are sharpened."""
    attention_dim: int = 128
    """Channels of the attention's queries and keys."""
    present: float = 0.5
    """Least probability of a class in an unlabeled image to get an activation map."""
    cutout: float = 0.2
    """Height and width of the hole in the strong view, relative to the crop (release: 100 of 513 pixels)."""
    batch_norm: BatchNorm = "separate"
    """Whether labeled and strong unlabeled images share batch statistics (release: separate)."""

    def __post_init__(self) -> None:
        require_positive("pseudoseg", self, "temperature", "attention_dim")
        require_share("pseudoseg", self, "present", "cutout")


@dataclass(frozen=True, kw_only=True)
class PC2SegOptions:
    """PC2Seg: consistent labels, contrasted features (a reconstruction). All defaults are ours: no code is public."""

    consistency: float = 1.0
    """l_1: weight of the squared distance of the two views' probabilities, summed over the classes."""
    contrast: float = 0.1
    """l_2: weight of the contrastive loss."""
    temperature: float = 0.1
    """tau of the contrastive loss."""
    anchors: int = 256
    """Anchors per image."""
    keys: int = 64
    """Pixels per image that others may take as negatives."""
    negatives: int = 256
    """N: number of negatives that an anchor's mean negative stands for."""
    batch_norm: BatchNorm = "separate"
    """Whether labeled and strong unlabeled images share batch statistics (ours: separate)."""

    def __post_init__(self) -> None:
        require_positive("pc2seg", self, "temperature", "anchors", "keys", "negatives")


@dataclass(frozen=True, kw_only=True)
class AELOptions:
    """AEL: classes of low confidence are trained on more often. The defaults are the release's for PASCAL VOC."""

    warmup: float = 0.0
    """Supervised training with pastes before the teacher starts: steps, or below 1 a share of the run (release: none,
    from ImageNet weights; a network from scratch scores better with some)."""
    ema_decay: float = 0.99
    """Largest decay of the EMA teacher."""
    momentum: float = 0.999
    """Decay of the class confidence."""
    weight: float = 1.0
    """Weight of both consistency losses (consist_weight)."""
    threshold: float = 0.7
    """Least teacher confidence of a pixel that is learned from (Cityscapes: 0)."""
    gamma: float = 2.0
    """Power of the confidence in a pixel's weight."""
    paste: float = 0.5
    """Probability that a labeled image gets a paste."""
    paste_classes: int = 1
    """Draws of classes to paste, per step (Cityscapes: 3)."""
    paste_exclude: str = ""
    """Classes that are never pasted, beside the background (the release: 0,1,2,8,10 of Cityscapes, for VOC too)."""
    paste_zoom: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest size of a paste, relative to its crop; with crops at 0.5..2 about the release's 0.1..2."""
    area: float = 0.03
    """Least share of a crop that a class must cover to be cut out (Cityscapes: 0.005)."""
    depth: int = 4
    """Crops that the reservoir holds per class."""
    fresh: int = 4
    """Crops that enter the reservoir per step, of all workers together."""
    batch_norm: BatchNorm = "separate"
    """Whether labeled and mixed images share batch statistics (release: separate)."""

    @property
    def excluded(self) -> list[int]:
        """The classes of `paste_exclude`.

        Raises:
            UserError: the text holds something else.
        """
        parts = [part.strip() for part in self.paste_exclude.split(",") if part.strip()]
        if not all(part.isdecimal() for part in parts):
            raise UserError(f"ael.paste_exclude: expected class numbers like 0,1,2, got {self.paste_exclude!r}")
        return [int(part) for part in parts]

    def __post_init__(self) -> None:
        require_positive("ael", self, "paste_classes", "paste_zoom", "depth", "fresh")
        require_share("ael", self, "ema_decay", "momentum", "threshold", "paste", "area")
        if self.paste_zoom[0] > self.paste_zoom[1]:
            raise UserError(f"ael.paste_zoom: must be the smaller and the larger end, got {self.paste_zoom}")
        _ = self.excluded


@dataclass(frozen=True, kw_only=True)
class U2PLOptions:
    """U2PL: unreliable pixels are negatives of a pixel contrast.

    The defaults are the release's values for PASCAL VOC, lambda_c is the paper's.
    """

    variant: Literal["paper", "upstream"] = "paper"
    """upstream: one-hot labels, negatives, class pairing, weight, padding, anchors (the alpha_t share of the lowest
    entropy) and positives (of each worker alone) as in the released code; with epoch_steps also its teacher's start."""
    warmup: float = 0.0125
    """Supervised training before the teacher starts: steps, or below 1 a share of the run (release: one epoch of 80 on
    VOC, none on Cityscapes)."""
    epoch_steps: int = 0
    """Steps for which alpha_t stays what it is (release: an epoch, 570 on VOC at 1_2); 0: it moves in every step."""
    ema_decay: float = 0.99
    """Largest decay of the EMA teacher."""
    teacher_passes: Literal[1, 2] = 2
    """2: labels from clean images, entropy and keys from mixed ones; 1: all from clean ones, mixed like the images."""
    mix: Literal["cutmix", "classmix", "cutout", "none"] = "cutmix"
    """Strong augmentation of the unlabeled images."""
    mix_share: float = 0.5
    """Probability that a step uses it."""
    alpha_0: float = 0.2
    """Share of unlabeled pixels that is unreliable at step 0; it falls linearly to 0."""
    thresholds: Literal["global", "worker"] = "global"
    """global: the entropy threshold is a quantile over all workers' pixels; worker: over each worker's (release)."""
    lambda_u: float = 1.0
    """Base weight of L_u: eta of equation 8; the paper's lambda_u is eta x shown / reliable pixels (release: 1)."""
    loss: Literal["contrastive", "binary"] = "contrastive"
    """contrastive: L_c, InfoNCE; binary: L_b, our derivation, as the release calls it without defining it."""
    lambda_c: float = 0.1
    """Weight of that loss."""
    negative_pixels: Literal["unreliable", "reliable", "all"] = "unreliable"
    """Which unlabeled pixels become negatives (the paper's ablation): the alpha_t share of the highest entropy, that of
    the lowest, or all."""
    temperature: float = 0.5
    """tau of the contrastive loss."""
    delta_p: float = 0.3
    """Least teacher probability of an anchor's own class."""
    r_l: int = 3
    """Class rank from which on a class is unlikely; rank 0 is the likeliest class."""
    r_h: int = 20
    """Class rank from which on a class is so unlikely that the pixel teaches nothing."""
    anchors: int = 256
    """Anchors per class, step and worker."""
    negatives: int = 50
    """Negatives per anchor."""
    negative_groups: int = 0
    """Groups of anchors that share their negatives; 0: each anchor has its own, as in the paper. Fewer are faster on
    CPUs and noisier, with the same expectation."""
    keys: int = 256
    """New keys per class, step and worker at most."""
    keys_in_all: int = 2048
    """New keys per class and step of all workers together. Beyond eight workers each gives fewer: else the exchange
    would grow with their number (2.8 GB a step at 512), and a queue would be overwritten every few steps."""
    queue: int = 30000
    """Capacity of a class's memory bank."""
    queue_background: int = 50000
    """Capacity of class 0's memory bank."""
    bank_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the stored keys; bfloat16 halves memory and traffic."""
    prototype_ema: bool = False
    """Smooth the positives over the steps (the release's anchor_ema, which it leaves off)."""
    parts: Literal["fast", "reference"] = "fast"
    """Which implementation computes the losses: the fast one, or the plain reference, many times slower."""
    batch_norm: BatchNorm = "joint"
    """Whether labeled and unlabeled images share batch statistics, in student and teacher (release: joint)."""

    def __post_init__(self) -> None:
        sizes = ("temperature", "r_l", "anchors", "negatives", "keys", "keys_in_all", "queue", "queue_background")
        require_positive("u2pl", self, *sizes)
        require_share("u2pl", self, "ema_decay", "alpha_0", "delta_p", "mix_share")
        if self.r_l >= self.r_h:
            raise UserError(f"u2pl.r_l {self.r_l}: must be below u2pl.r_h {self.r_h}")
        if self.negative_groups < 0 or self.anchors % self.groups:
            raise UserError(f"u2pl.negative_groups {self.negative_groups}: must divide u2pl.anchors {self.anchors}")

    @property
    def groups(self) -> int:
        """Number of sets of negatives per class and step."""
        return self.negative_groups or self.anchors

    def keys_of(self, workers: int) -> int:
        """New keys per class and step of each worker, if there are `workers` of them."""
        return max(1, min(self.keys, self.keys_in_all // workers))


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
