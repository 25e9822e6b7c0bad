"""CCT (Ouali et al., CVPR 2020): auxiliary decoders of perturbed features agree with the main decoder.

L = L_s + w(t) / K sum_k MSE(aux_k(P_k(f_u)), sg main(f_u)), both after a softmax; sg stops the gradient. f_u is the
encoder's last feature map of an unlabeled image, P_k one of seven perturbations (section 3.3). Their random numbers are
arguments, so that a step is a function of its seed. Code: yassouali/CCT; `docs/methods.md` says where we differ.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.config.options import CCTOptions
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Method, Step
from pipeline.models import SegmentationModel, upsample
from pipeline.models.parts import subpixel_decoder
from pipeline.ops import mixing
from pipeline.ops.grid import shrink
from pipeline.ops.losses import probability_mse
from pipeline.ops.mixing import Boxes, class_boxes, inside
from pipeline.ops.schedules import sigmoid_ramp

# ---- perturbations of a feature map [B,c,h,w] -------------------------------------------------------------------


def scale_noise(features: Tensor, draws: Tensor, reach: float) -> Tensor:
    """F-Noise: f (1 + n) with n uniform in -reach..reach; `draws` float [c,h,w] in [0,1) are shared by the batch."""
    return features * (1.0 + reach * (2.0 * draws - 1.0))


def drop_salient(features: Tensor, draws: Tensor, low: float, high: float) -> Tensor:
    """F-Drop: zeroes the most active cells, those whose mean over the channels reaches a threshold.

    Args:
        features: float [B,c,h,w].
        draws: float [1] in [0,1), place of the threshold between `low` and `high`.
        low: least threshold, relative to the image's largest mean.
        high: largest threshold, relative to the same.
    """
    attention = features.mean(1, keepdim=True)
    threshold = attention.amax((2, 3), keepdim=True) * (low + (high - low) * draws)
    return features * (attention < threshold)


def guided_cutout(label: Tensor, foreground: Tensor, draws: Tensor, share: float) -> Tensor:
    """G-Cutout: a part of the box around each foreground class is cut out; True where cells stay, bool [B,h,w].

    The release cuts a part of the box of every connected contour, which it finds on the CPU. One box a class is found
    on the device.

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


# ---- the method -------------------------------------------------------------------------------------------------


Draw = Callable[..., Tensor]
"""Called with a shape, and `shared=True` for the same numbers on all ranks: uniform numbers in [0,1)."""


class CCT(Method):
    """A network, and K small auxiliary decoders that are used in training alone."""

    def __init__(self, config: Config, num_classes: int) -> None:
        options = config.options_of(CCTOptions)
        super().__init__(config, num_classes, options.batch_norm)
        self.options = options
        self.student = self.build_network(features=False)
        self.kinds = [kind for kind in options.kinds for _ in range(getattr(self.options, kind))]
        encoder, decoder = self.student.encoder, self.student.decoder
        inputs, doublings = encoder.channels.high, round(math.log2(encoder.strides.high / decoder.stride))
        self.auxiliary = nn.ModuleList(subpixel_decoder(inputs, num_classes, doublings) for _ in self.kinds)

    def networks(self) -> dict[str, SegmentationModel]:
        """The student with its main decoder."""
        return {"student": self.student}

    def param_groups(self) -> list[dict[str, object]]:
        """The auxiliary decoders learn as fast as the main one."""
        heads = {"params": list(self.auxiliary.parameters()), "lr_mult": self.config.optim.head_lr_mult}
        return [*super().param_groups(), heads]

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s + w(t) L_u (paper eq. 1 and 2)."""
        labeled, unlabeled = self.sides(batch)
        of_labeled, maps = self.forward_groups(self.student.encode, labeled.image, unlabeled.image)
        prediction = self.student.decode(of_labeled)
        with torch.no_grad():
            target = self.student.decode(maps).logits.float().softmax(1)
        valid = shrink(unlabeled.valid, (target.shape[2], target.shape[3]))
        distances = [
            probability_mse(logits, target, valid, step.world, "valid") / self.num_classes
            for logits in self._auxiliary_logits(maps.high, target, step)
        ]
        weight = self.options.weight * sigmoid_ramp(step.index, self.steps(self.options.ramp))
        terms = {
            "supervised": self.supervised(prediction, labeled, step.world),
            "consistency": weight * torch.stack(distances).mean(),
        }
        return Losses(terms, {"disagreement": torch.stack(distances).detach()})

    def _auxiliary_logits(self, features: Tensor, target: Tensor, step: Step) -> list[Tensor]:
        """The logits of every auxiliary decoder for its perturbed features, at the target's size: float [B,C,h,w]."""
        small = (features.shape[2], features.shape[3])
        label = shrink(target.argmax(1), small)
        foreground = self.foreground(len(features), step, features.device)
        outputs = []
        for number, (kind, head) in enumerate(zip(self.kinds, self.auxiliary, strict=True)):

            def draw(*shape: int, shared: bool = False, name: str = f"cct/{number}") -> Tensor:
                uniform = step.uniform_shared if shared else step.uniform_per_image
                return uniform(name, shape, features.device)

            perturbed = self.perturb(kind, features, label, foreground, head, draw)
            outputs.append(upsample(head(perturbed), (target.shape[2], target.shape[3])))
        return outputs

    def perturb(
        self, kind: str, features: Tensor, label: Tensor, foreground: Tensor, head: nn.Module, draw: Draw
    ) -> Tensor:
        """The perturbed features P_k(f), float [B,c,h,w] (paper section 3.3).

        Args:
            kind: one of `CCTOptions.kinds`.
            features: float [B,c,h,w].
            label: int64 [B,h,w], predicted classes.
            foreground: bool [B,C], which classes are objects.
            head: the auxiliary decoder, for the adversarial kind.
            draw: makes the random numbers.
        """
        options, (count, channels) = self.options, features.shape[:2]
        if kind == "dropout":
            return mixing.drop_channels(features, draw(count, channels), options.dropout_rate)
        if kind == "feature_noise":
            return scale_noise(features, draw(*features.shape[1:], shared=True), options.noise)
        if kind == "feature_drop":
            return drop_salient(features, draw(1, shared=True), options.drop_low, options.drop_high)
        if kind == "adversarial":
            start = draw(*features.shape[1:], shared=True).expand_as(features)  # per image, all ranks' would be drawn
            return adversarial(features, head, start, options.xi, options.epsilon)
        if kind == "cutout":
            places = draw(count, self.num_classes, 2)
            return features * guided_cutout(label, foreground, places, options.erase).unsqueeze(1)
        objects = foreground.gather(1, label.flatten(1)).view_as(label).unsqueeze(1)
        return features * (objects if kind == "context" else ~objects)

    def foreground(self, count: int, step: Step, device: torch.device) -> Tensor:
        """Which classes are objects in each image, bool [B,C]: all but the background (the release's rule, for VOC).

        In data without a background class every class is an object with probability 1/2.
        """
        if self.background is None:
            return step.uniform_per_image("cct/foreground", (count, self.num_classes), device) < 0.5
        return (torch.arange(self.num_classes, device=device) != self.background).expand(count, -1)
