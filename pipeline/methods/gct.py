"""GCT (Ke et al., ECCV 2020): two networks, and a flaw detector that says which of them is right at a pixel.

Each network has the loss L_s + L_fc + L_dc, the detector L_D. Code: ZHKKKe/PixelSSL (ssl_gct.py, the official one).
It alternates between networks and detector. Here one backward does both: the networks see the detector with detached
parameters, the detector sees detached predictions, so each loss reaches its own parameters alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.batch import Batch, Views
from pipeline.config.options import GCTOptions
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Method, Step
from pipeline.models import SegmentationModel, upsample
from pipeline.ops.entropy import IGNORE
from pipeline.ops.losses import squared_error
from pipeline.ops.schedules import sigmoid_ramp
from pipeline.ops.world import World

# ---- the detector -----------------------------------------------------------------------------------------------


class FlawDetector(nn.Module):
    """Eight 4x4 convolutions over an image and its prediction; five of them halve the size.

    Each pads by 2 (release: 1), so that crops below 60 pixels do not shrink to nothing.

    Args:
        inputs: channels, those of images + C.
        width: channels of the first layer.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for factor, stride in ((1, 2), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1)):
            convolution = nn.Conv2d(inputs, factor * width, 4, stride, padding=2)
            layers += [convolution, HalfInstanceNorm(factor * width), nn.LeakyReLU(0.2)]
            inputs = factor * width
        self.layers = nn.Sequential(*layers, nn.Conv2d(inputs, 1, 4, 2, padding=2))

    def forward(self, normal: Tensor, probability: Tensor) -> Tensor:
        """Flaws, about 0..1 but not bounded: float [B,1,H,W].

        Args:
            normal: float [B,3,H,W], normalised image.
            probability: float [B,C,H,W].
        """
        flaw = self.layers(torch.cat([normal, probability], 1))
        return upsample(flaw, (normal.shape[2], normal.shape[3]))


class HalfInstanceNorm(nn.Module):
    """Batch norm of the first half of the channels, instance norm without parameters of the rest (IBN)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.batch = nn.BatchNorm2d((channels + 1) // 2)
        self.instance = nn.InstanceNorm2d(channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises float [B,c,h,w]; the shape stays."""
        half = self.batch.num_features
        return torch.cat([self.batch(x[:, :half]), self.instance(x[:, half:])], 1)


# ---- flaw maps --------------------------------------------------------------------------------------------------


def gaussian_blur(x: Tensor, size: int) -> Tensor:
    """Blurs float [B,1,H,W] with a Gaussian of odd width near `size`; borders are mirrored.

    The deviation follows from the width by OpenCV's rule, as in the release.
    """
    width = size + 1 - size % 2
    sigma = 0.3 * ((width - 1) * 0.5 - 1) + 0.8
    offset = torch.arange(width, device=x.device, dtype=x.dtype) - width // 2
    kernel = (-0.5 * (offset / sigma).square()).exp()
    kernel = kernel / kernel.sum()
    padded = F.pad(x, (width // 2,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


def min_max(x: Tensor) -> Tensor:
    """Each image of float [B,1,H,W], scaled to 0..1; a constant image becomes 0."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low + 1e-9)


def flaw_target(probability: Tensor, truth: Tensor, mu: float, nu: int) -> Tensor:
    """The detector's target: the error of a prediction, blurred and scaled to 0..1 (pipeline C of the release).

    Args:
        probability: float [B,C,H,W].
        truth: int64 [B,H,W]; the error is 0 where it is 255 (in the release the whole probability counts as error).
        mu: weight of sum_c |onehot - p|, which is at most 2.
        nu: how often the blurred error is dilated and blurred again.

    Returns:
        float [B,1,H,W].
    """
    classes, height = probability.shape[1], probability.shape[2]
    known = truth != IGNORE
    onehot = F.one_hot(truth.clamp_max(classes - 1), classes).movedim(-1, 1)
    error = mu * (onehot - probability.detach()).abs().sum(1, keepdim=True) * known.unsqueeze(1)
    error = gaussian_blur(error, height // 8)
    for _ in range(nu):
        dilated = F.max_pool2d(F.pad(error, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
        error = gaussian_blur(dilated, height // 4)
    return min_max(error)


def handled(flaw: Tensor, clip: float = 0.1) -> Tensor:
    """The detector's output prepared for comparison: positive part, blurred, scaled to 0..1; detached, [B,1,H,W].

    Args:
        flaw: float [B,1,H,W], output of the detector.
        clip: an image whose largest blurred flaw does not exceed it has no flaw: all 0 (release: 0.1).
    """
    smooth = gaussian_blur(flaw.detach().clamp_min(0.0), flaw.shape[2] // 16)
    return torch.where(smooth.amax((1, 2, 3), keepdim=True) > clip, min_max(smooth), 0.0)


class Exchange(NamedTuple):
    """The targets of the two networks."""

    targets: tuple[Tensor, Tensor]
    """float [B,C,H,W] each, detached: a network's own probabilities where its flaw is lower, else the other's."""
    both_bad: Tensor
    """bool [B,1,H,W], pixels at which both flaws are above the limit."""


def exchange(left: Tensor, right: Tensor, left_flaw: Tensor, right_flaw: Tensor, limit: float) -> Exchange:
    """Dynamic consistency (paper eq. 5): at each pixel the prediction with the lower flaw is the target of both.

    Args:
        left: float [B,C,H,W], probabilities.
        right: likewise.
        left_flaw: float [B,1,H,W] in 0..1, from `handled`.
        right_flaw: likewise.
        limit: xi; flaws above it count as 1, so at a pixel where both are bad each keeps its own prediction.
    """
    left_bad, right_bad = left_flaw > limit, right_flaw > limit
    one, two = left_flaw.masked_fill(left_bad, 1.0), right_flaw.masked_fill(right_bad, 1.0)
    left, right = left.detach(), right.detach()
    return Exchange((torch.where(one <= two, left, right), torch.where(two <= one, right, left)), left_bad & right_bad)


# ---- the method -------------------------------------------------------------------------------------------------


class GCT(Method):
    """Two networks that differ in their heads' initial weights, and the flaw detector."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(GCTOptions)
        super().__init__(config, num_classes, options.batch_norm)
        self.options = options
        self.left = self.build_network(features=False)
        self.right = self.build_network(features=False)
        self.detector = FlawDetector(self.channels + num_classes, self.options.detector_width)

    def networks(self) -> dict[str, SegmentationModel]:
        """Both networks; the left one is the result, as the release reports it first."""
        return {"left": self.left, "right": self.right}

    def trained(self) -> list[SegmentationModel]:
        """Both networks, with the optimiser of the run."""
        return [self.left, self.right]

    def param_groups(self) -> list[dict[str, object]]:
        """Those of the networks, and the detector with an Adam of its own: SGD at the networks' rate diverges."""
        detector = {
            "params": list(self.detector.parameters()),
            "lr_mult": self.options.detector_lr / max(self.config.optim.lr, 1e-12),
            "optimizer": "adam",
            "betas": (0.9, 0.99),
            "weight_decay": 0.0,
        }
        return [*super().param_groups(), detector]

    def forward(self, batch: Batch, step: Step) -> Losses:
        """The losses of both networks and of the detector; unlabeled images count in L_fc and L_dc alone."""
        labeled, unlabeled = self.sides(batch)
        count, size = len(labeled.image), labeled.size
        images = torch.cat([labeled.image, unlabeled.image])
        valid = torch.cat([labeled.valid, unlabeled.valid])
        predictions = [self.forward_all(network, labeled.image, unlabeled.image) for network in self.trained()]
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
        """L_D: MSE between flaw maps and `flaw_target` of labeled images (paper eq. 2); for the detector alone."""
        target = flaw_target(probability, labeled.truth, self.options.mu, self.options.nu)
        return squared_error(self.detector(normal, probability.detach()), target, labeled.valid, world, "valid")


def _correction(flaw: Tensor, both_bad: Tensor, valid: Tensor, world: World) -> Tensor:
    """L_fc: mean over valid pixels of the squared flaw where both networks are bad, 0 elsewhere (paper eq. 4)."""
    return squared_error(flaw * both_bad, torch.zeros_like(flaw), valid, world, "valid")
