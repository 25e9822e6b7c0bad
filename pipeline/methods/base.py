"""The interface between a method and the trainer, and the supervised loss that all methods share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Views
from pipeline.config.methods import SPECS, ViewSpec, steps_of
from pipeline.config.schema import BatchNorm, Config
from pipeline.models import Prediction, Scale, SegmentationModel, build_model
from pipeline.models.norm import freeze_batchnorm
from pipeline.models.parts import FeatureMaps, joined
from pipeline.ops.grid import make_grid, upsample
from pipeline.ops.losses import cross_entropy, dice_loss, focal_cross_entropy, ohem_cross_entropy
from pipeline.ops.world import World, uniform

In = TypeVar("In", Tensor, FeatureMaps)
Out = TypeVar("Out", FeatureMaps, Prediction)


class Losses(NamedTuple):
    """What a forward pass returns."""

    terms: dict[str, Tensor]
    """0-dim losses by name, already weighted; the trainer minimises their sum."""
    logs: dict[str, Tensor]
    """Detached values for the run's records, by name: 0-dim, or [C] with one value a class."""


class Partition(NamedTuple):
    """What a method would make of n unlabeled pixels."""

    reliable: Tensor
    """bool [n], the pixels that would carry a pseudo-label."""
    negative: Tensor | None = None
    """bool [n,C], the classes of which each pixel could be a negative; None: the method takes no negatives."""


@dataclass(frozen=True)
class Step:
    """One step of the run. Everything random in it is a function of (seed, index), so a resumed run draws the same."""

    index: int
    """0-based step of the run."""
    total: int
    """Steps of the whole run."""
    seed: int
    """Seed of the run."""
    world: World
    """The processes that share the global batch, and the rank of this one."""

    def uniform(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Numbers in [0,1), float32 of `shape`, different for every (seed, step, rank, name)."""
        return self._draw(f"{name}/{self.world.rank}", shape, device)

    def uniform_shared(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """As `uniform`, but the same numbers on every rank."""
        return self._draw(name, shape, device)

    def uniform_per_image(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """As `uniform` for `shape` = (images, ...), drawn for the global batch: independent of the number of ranks."""
        count = shape[0]
        drawn = self.uniform_shared(name, (count * self.world.size, *shape[1:]), device)
        return drawn[self.world.rank * count :][:count]

    def _draw(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return uniform(f"{self.seed}/{self.index}/{name}", shape, device)


def _length(group: Tensor | FeatureMaps) -> int:
    """Number of images in a group of images or feature maps."""
    return len(group) if isinstance(group, Tensor) else len(group.high)


def untouched(prediction: Prediction) -> Tensor:
    """A loss of 0, 0-dim, that gives the representation head a gradient of 0.

    DDP waits for a gradient of every parameter, also in steps in which no loss uses the head.
    """
    if prediction.features is None:
        return torch.zeros((), device=prediction.logits.device)
    return 0.0 * prediction.features.float().sum()


class Predictor(nn.Module):
    """A network as used at test time: uint8 [B,3,H,W] -> logits float [B,C,h,w]."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [B,3,H,W] to logits float [B,C,h,w] at the network's own resolution."""
        return self.model.logits(image)


class Method(nn.Module, ABC):
    """One system of the comparison: its networks, losses and state. The trainer wraps it in DDP as a whole.

    Rules: a loss is this rank's share of a global mean (see `ops.losses`); the losses of every step must give every
    trainable parameter a gradient; nothing in `forward` waits for the device; all state is parameters and buffers.
    """

    warmup: int = 0
    """Steps at the start in which it learns from the labels alone."""

    def __init__(self, config: Config, num_classes: int, batch_norm: BatchNorm = "joint") -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.batch_norm: BatchNorm = batch_norm
        self.channels = len(config.data.mean) or 3
        """Bands of the images."""
        given = config.data.background
        self.background = int(given) if given.isdigit() else None
        """The background class, or None if there is none; the trainer has already asked the dataset for `auto`."""
        largest = max(config.loss.class_weights, default=1.0)
        weights = [each / largest for each in config.loss.class_weights]  # their ratios alone matter
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", torch.tensor(weights) if weights else None, persistent=False)

    @property
    def views(self) -> ViewSpec:
        """Which views of the images it needs."""
        return SPECS[self.config.method].views

    def steps(self, duration: float) -> int:
        """The steps of a duration: an option's value that is steps or, below 1, a share of the run."""
        return steps_of(duration, self.config.optim.steps)

    @abstractmethod
    def forward(self, batch: Batch, step: Step) -> Losses:
        """The losses of one training step.

        Args:
            batch: this rank's images, on the device of the networks.
            step: which step of the run it is, for schedules and random numbers.
        """

    @abstractmethod
    def networks(self) -> dict[str, SegmentationModel]:
        """The networks that are scored, by name; the first one is the method's result."""

    def trained(self) -> list[SegmentationModel]:
        """The networks that the optimiser trains: the one called `student`, unless a method overrides this."""
        return [self.networks()["student"]]

    def after_step(self, step: Step) -> None:
        """Updates the method's state after the optimiser's step, such as an EMA teacher; without gradient."""
        del step

    def partition(self, logits: Tensor, step: Step) -> Partition | None:
        """How the method would part unlabeled pixels at a step, for people to look at; None: it parts none.

        Args:
            logits: float [n,C] of `predictor`; a threshold that is a quantile is that of these n pixels.
            step: whose thresholds to take.
        """
        del logits, step
        return None

    def stored_keys(self) -> list[Tensor] | None:
        """What a memory bank holds as negatives of each class, by class float [n,D]; None: the method has no bank."""
        return None

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser: `params`, `lr_mult` (relative to `optim.lr`)."""
        nets = self.trained()
        return [
            {"params": [p for net in nets for p in net.encoder_parameters()], "lr_mult": 1.0},
            {
                "params": [p for net in nets for p in net.head_parameters()],
                "lr_mult": self.config.optim.head_lr_mult,
            },
        ]

    def predictor(self) -> nn.Module:
        """What is scored and shipped: uint8 [B,3,H,W] -> logits [B,C,h,w]."""
        return Predictor(next(iter(self.networks().values())))

    def build_network(self, *, features: bool) -> SegmentationModel:
        """A network as the config says, its auxiliary head included if its loss has a weight.

        Raises:
            UserError: its weights do not fit.
        """
        aux, data = self.config.loss.aux_weight > 0, self.config.data
        network = build_model(
            self.config.model,
            self.num_classes,
            features=features,
            aux=aux,
            micro_batches=self.config.optim.accumulate,
            scale=Scale(data.mean, data.std) if data.mean else None,
        )
        if self.batch_norm == "frozen":
            freeze_batchnorm(network.encoder)
        return network

    def forward_groups(self, network: Callable[[In], Out], *groups: In) -> list[Out]:
        """The outputs of a network for several groups of images, one output a group.

        `batch_norm` says whether the groups share batch statistics: `joint` passes them as one batch.

        Args:
            network: a network, or its `encode` or `decode`.
            groups: images uint8 [B,3,H,W], or their feature maps; labeled ones first.
        """
        if self.batch_norm != "joint":
            return [network(group) for group in groups]
        outputs, ends = network(joined(groups)), list(accumulate(map(_length, groups)))
        return [outputs.of(slice(end - _length(group), end)) for end, group in zip(ends, groups, strict=True)]

    def forward_all(self, network: Callable[[Tensor], Prediction], *groups: Tensor) -> Prediction:
        """As `forward_groups`, with one prediction for the images of all groups, in order."""
        if self.batch_norm == "joint":
            return network(torch.cat(groups))
        return joined([network(group) for group in groups])

    def sides(self, batch: Batch) -> tuple[Views, Views]:
        """The labeled side with its masks, and the unlabeled one with the views that the method asks for.

        Raises:
            ValueError: the batch lacks masks, unlabeled images, or views.
        """
        labeled, unlabeled, spec = batch.labeled, batch.unlabeled, self.views
        if labeled.mask is None or unlabeled is None or len(unlabeled.strong) < spec.strong:
            raise ValueError(
                f"{type(self).__name__} needs labels, and unlabeled images with {spec.strong} strong views"
            )
        if spec.pseudo and unlabeled.pseudo is None:
            raise ValueError(f"{type(self).__name__} needs labels of the unlabeled images, made beforehand")
        return labeled, unlabeled

    def supervised(self, prediction: Prediction, labeled: Views, world: World) -> Tensor:
        """L_s of the labeled images, 0-dim, as the section `loss` says, plus the weighted auxiliary head."""
        total = self._supervised(prediction.logits, labeled.truth, world)
        if prediction.aux is not None:
            total = total + self.config.loss.aux_weight * self._supervised(prediction.aux, labeled.truth, world)
        return total

    def _supervised(self, logits: Tensor, mask: Tensor, world: World) -> Tensor:
        loss, size = self.config.loss, (mask.shape[-2], mask.shape[-1])
        shaped = loss.class_weights or loss.focal
        fine = upsample(logits.float(), size) if shaped or loss.dice or loss.supervised == "ohem" else logits
        if loss.supervised == "ohem":
            total = ohem_cross_entropy(fine, mask, world)
        elif shaped:
            total = focal_cross_entropy(fine, mask, world, self.class_weights, loss.focal)
        else:
            grid = make_grid(size, (logits.shape[-2], logits.shape[-1]))
            total = cross_entropy(logits, grid.arrange(mask), world, grid)
        return total + loss.dice * dice_loss(fine, mask, world) if loss.dice else total
