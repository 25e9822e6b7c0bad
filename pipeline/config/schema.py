"""What one run can be told: frozen dataclasses, one docstring per field, and the way from YAML to them.

Defaults < preset < YAML file < flags; the flags are made in `pipeline.config.cli`. Every field under `scaling` and
`run` may change when a run is resumed; the others make the result what it is.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, TypeVar

import yaml

from pipeline.config.backbones import find_decoder
from pipeline.config.parse import MAX_YAML_BYTES, parse_yaml, require_positive, require_share, suggest
from pipeline.errors import UserError
from pipeline.storage import file_size, read_text

Section = TypeVar("Section")
BatchNorm = Literal["joint", "separate", "frozen"]
"""Which images share the statistics of batch norm in training: `joint`, labeled and unlabeled ones pass the network in
one batch; `separate`, each group by itself; `frozen`, each group by itself, and the encoder keeps the statistics that
came with its weights. Releases differ, and on small sets it moves scores by points (docs/methods.md)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, and how training views are made of them."""

    root: str | None = None
    """Prepared dataset: a local path or s3://bucket/prefix; `generated`: the shapes dataset, made on first use."""
    unlabeled_pools: tuple[str, ...] = ()
    """More unlabeled images: pools or prepared datasets, by path or URI."""
    pool_weights: tuple[float, ...] = ()
    """Shares of the unlabeled batch: own images (0: none), then each pool. None given: by number of images."""
    pool_generations: tuple[int, ...] = ()
    """How many generations of each pool count. None given: those that are there when the run begins."""
    protocol: str | None = None
    """Which split lists of the dataset (splits/PROTOCOL/SPLIT). None: the dataset's own default."""
    pseudo_labels: str | None = None
    """Pseudo-labels of the unlabeled images, made beforehand (u2pl self_training); for --method self_training."""
    crop: tuple[int, int] = (513, 513)
    """Height and width of a training view in pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random resize before the crop, relative to the stored image."""
    flip: bool = True
    """Mirror a view with probability 1/2."""
    strength: float = 0.5
    """Largest change of brightness, contrast and saturation in strong views, relative to what they are."""
    hue: float = 0.25
    """Largest change of the hue in strong views, as a share of the colour circle; less where colour tells classes."""
    grey: float = 0.2
    """Probability that a strong view loses its colours."""
    blur: float = 0.5
    """Probability that a strong view is blurred, by 0.1 to 2 pixels; less where fine texture tells classes."""
    mean: tuple[float, ...] = ()
    """Mean of each band, 0..255, with which networks normalise. None given: the dataset's own, of RGB ImageNet's."""
    std: tuple[float, ...] = ()
    """Standard deviation of each band, in the same way."""
    transform: str | None = None
    """Function of your own that changes each view after crop and flip: package.module.function."""
    balance: float = 0.0
    """Labeled images of classes that a smaller share of them shows come more often in an epoch: sqrt(balance / share)
    times for the rarest class of the image (Gupta et al. 2019); 0: each comes once."""
    background: str = "auto"
    """Class of what is no object: its number, none, or auto: the dataset's class named background, if it has one."""

    def __post_init__(self) -> None:
        require_positive("data", self, "crop", "scale")
        require_share("data", self, "strength", "grey", "blur", "balance")
        if self.background not in ("auto", "none") and not (self.background.isascii() and self.background.isdigit()):
            raise UserError(f"data.background: expected a class number, none or auto, got {self.background}")
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise UserError(f"data.std {self.std}: must be a number above 0 for each of data.mean {self.mean}")
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"data.hue: must be between 0 and 0.5, got {self.hue}")
        require_positive("data", self, "pool_generations")
        pools = len(self.unlabeled_pools)
        if len(set(self.unlabeled_pools)) < pools:
            raise UserError("data.unlabeled_pools: one is named twice; give it more weight instead")
        if self.pool_weights and (len(self.pool_weights) != 1 + pools or not all(self.pool_weights[1:])):
            raise UserError(
                f"data.pool_weights: must be {1 + pools} numbers (own images, then each of {pools} pools, above 0), "
                f"got {len(self.pool_weights)}: {self.pool_weights}"
            )
        if self.pool_generations and len(self.pool_generations) != pools:
            raise UserError(
                f"data.pool_generations: must be one for each of {pools} pools, got {self.pool_generations}"
            )
        if self.scale[0] > self.scale[1]:
            raise UserError(f"data.scale: must be the smaller and the larger end, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network of student and teacher."""

    backbone: str = "resnet50"
    """Encoder: tiny or vit_tiny (small, from scratch, for CPUs); mobilenet_v2, resnet18, resnet34, resnet50, resnet101;
    dinov2_vits14, dinov2_vitb14, dinov2_vitl14; or timm/NAME."""
    decoder: str = "auto"
    """tiny, deeplab, segformer or dpt; auto: tiny for tiny, dpt for ViTs, deeplab for all others."""
    weights: str = "torchvision"
    """What the network begins with: none, torchvision or timm (download weights of the encoder), a file or URI of a
    state dict of the encoder, or a trained network: run directory, checkpoint folder or export as safetensors."""
    output_stride: Literal[8, 16] = 8
    """Input pixels per cell of the encoder's last feature map, for deeplab."""
    width: int = 256
    """Channels of the decoder; those of dpt follow from the encoder."""
    feature_dim: int = 256
    """Channels of the representation head (contrastive methods)."""
    dropout: float = 0.1
    """Channel dropout in the heads of deeplab and segformer."""
    checkpoint_activations: bool = False
    """Hold the inputs of the encoder's blocks alone and compute the blocks again in the backward pass: less memory, a
    quarter to a third more work, the same result. May change when a run is resumed."""

    def __post_init__(self) -> None:
        find_decoder(self.decoder, self.backbone)
        require_positive("model", self, "width", "feature_dim")
        require_share("model", self, "dropout")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser, schedule and batch."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has momentum 0.9."""
    lr: float = 1e-3
    """Base learning rate of the encoder, reached after the warm-up."""
    head_lr_mult: float = 10.0
    """Learning rate of decoder and heads, relative to the encoder's."""
    layer_decay: float = 1.0
    """Learning rate of each layer of the encoder, relative to the layer behind it; the last one has the encoder's."""
    weight_decay: float = 1e-4
    """Decay of the weights."""
    decay_norms: bool = True
    """Decay norms, biases, and embeddings of class and position, too; most recipes of transformers do not."""
    schedule: Literal["poly", "cosine"] = "poly"
    """How the learning rate falls: as (1 - step/steps)^power, or as half a cosine; both from the first step on."""
    power: float = 0.9
    """Exponent of the poly schedule."""
    warmup: float = 0.0
    """Length of the learning rate's linear rise from lr / warmup: steps, or below 1 a share of the run; 0: none."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0: no limit."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A gradient that is not finite: stop ends the run; skip leaves that update out and waits for each gradient."""
    steps: int = 45600
    """Training steps of the whole run."""
    batch_labeled: int = 16
    """Labeled images per step over all workers."""
    batch_unlabeled: int = 16
    """Unlabeled images per step over all workers."""
    accumulate: int = 1
    """Micro-batches of a worker's images, for less memory: networks pass one after the other, and all but one pass
    twice. Losses are those of the whole batch; statistics of batch norm are of a micro-batch."""

    def __post_init__(self) -> None:
        require_positive("optim", self, "steps", "batch_labeled", "batch_unlabeled", "accumulate", "layer_decay")
        require_share("optim", self, "layer_decay")
        largest = 1e36  # optimisers multiply and divide it, in single precision
        if not abs(self.lr) * max(1.0, abs(self.head_lr_mult)) < largest:
            raise UserError(f"optim.lr {self.lr:g}: with optim.head_lr_mult it is beyond {largest:g}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The supervised loss L_s, of every method."""

    supervised: Literal["ce", "ohem"] = "ce"
    """ce: cross entropy; ohem: only hard pixels (threshold 0.7, at least 100000 kept per worker)."""
    aux_weight: float = 0.0
    """Weight of the auxiliary head's L_s; 0: no such head."""
    class_weights: tuple[float, ...] = ()
    """Weight of the pixels of each class, a number for each, in the order of the ids; none: all 1."""
    focal: float = 0.0
    """Focusing gamma: a pixel weighs (1 - p)^gamma, p the probability of its class (Lin et al. 2017: 2); 0: all 1."""
    dice: float = 0.0
    """Weight of the soft Dice loss, which is added (Milletari et al. 2016); 0: none."""

    def __post_init__(self) -> None:
        if self.class_weights and not any(self.class_weights):
            raise UserError(f"loss.class_weights {self.class_weights}: at least one must be above 0")
        if self.supervised == "ohem" and (self.class_weights or self.focal):
            key = "class_weights" if self.class_weights else "focal"
            raise UserError(f"loss.{key}: loss.supervised ohem picks its pixels itself; take ce, or leave it out")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How the validation set is scored."""

    every: int = 2280
    """Steps between evaluations; the last step is always evaluated."""
    mode: Literal["dataset", "whole", "sliding"] = "dataset"
    """whole image or sliding window; dataset: as the dataset itself says."""
    scale: float = 1.0
    """Resize before the network; logits go back to the stored size, where they are scored."""
    window: tuple[int, int] = (769, 769)
    """Sliding window, height and width; its stride is two thirds of that."""
    patience: int = 0
    """Evaluations in a row without a better mIoU after which a run ends early; 0: it trains all steps."""

    def __post_init__(self) -> None:
        require_positive("eval", self, "every", "scale", "window")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Machines; may change when a run is resumed. The global batch and the learning rate stay what they are."""

    workers: str = "auto"
    """Train workers: a number, or the fewest and the most (2..8) for a run that goes on with what is left when nodes
    are lost and grows when they return; auto: one per GPU of the cluster, or 2 on a cluster of CPUs. Where nodes are
    started for jobs it must be said."""
    cpus_per_worker: float = 0.0
    """CPUs reserved per worker; 0: 4 beside a GPU, else 0.5 so that Ray Data keeps some."""
    gpus_per_worker: float = 1.0
    """Of a worker, on a cluster that has GPUs: 1, less for a run of one worker that shares its GPU, or 0."""

    def __post_init__(self) -> None:
        if self.workers != "auto":
            fewest, most = self.limits()
            if not 1 <= fewest <= most:
                raise UserError(f"scaling.workers: expected such as 4, 2..8 or auto, got {self.workers}")
        require_share("scaling", self, "gpus_per_worker")
        if 0 < self.gpus_per_worker < 1 and self.workers not in ("1", "auto"):
            raise UserError(
                f"scaling.gpus_per_worker {self.gpus_per_worker:g}: workers of one run cannot share a GPU: "
                "set scaling.workers 1"
            )

    def limits(self) -> tuple[int, int]:
        """The fewest and the most workers; not for `auto`.

        Raises:
            UserError: `workers` says neither.
        """
        fewest, dots, most = self.workers.partition("..")
        if not all(part.isascii() and part.isdigit() for part in ([fewest, most] if dots else [fewest])):
            raise UserError(f"scaling.workers: expected such as 4, 2..8 or auto, got {self.workers}")
        return int(fewest), int(most if dots else fewest)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Bookkeeping, and how the work is done; may change when a run is resumed."""

    decode: Literal["worker", "cluster"] = "worker"
    """Where images are decoded and cut: in the worker's own CPUs, or in tasks on any CPUs of the cluster, for GPU nodes
    that have few. The batches are the same."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "tf32"
    """bf16, fp16: autocast of the forward pass; tf32: fp32 whose convolutions may round to TF32 on GPUs; fp32: they may
    not. On CPUs tf32 is fp32. fp16, for GPUs without bf16 (T4, V100), scales the loss, leaves out updates whose
    gradient overflows, and waits for each gradient."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the losses; auto: on GPUs, and on CPUs from 4 million pixels times classes a step, where it pays."""
    compile_network: bool = False
    """Compile encoder stages and heads for training steps, too; the first steps then take minutes."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """What workers exchange of their gradients; bf16: half the bytes, each worker's gradient rounded."""
    log_every: int = 25
    """Steps between log lines."""
    checkpoint_every: int = 570
    """Steps between checkpoints; every evaluation also writes one."""
    max_failures: int = 3
    """How often lost workers are replaced before the run gives up."""
    storage_patience: float = 60.0
    """Seconds for which storage that fails or does not answer is asked again before the run stops."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    pictures: int = 4
    """Validation images that are drawn at each evaluation, into RUN/pictures and TensorBoard; 0: none."""
    wandb: bool = False
    """Send the records to Weights & Biases, too (u2pl-ray[wandb]); WANDB_PROJECT and its other variables hold."""
    mlflow: bool = False
    """Send the records to MLflow, too (u2pl-ray[mlflow]), at MLFLOW_TRACKING_URI."""

    def __post_init__(self) -> None:
        require_positive("run", self, "log_every", "checkpoint_every", "storage_patience")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    method: str = "u2pl"
    """Which system to train."""
    split: str = "1_2"
    """Labeled images: 1_16, 1_8, 1_4, 1_2, full, or the name of a list folder of the protocol. 1_8 is an eighth of the
    train images that have a mask."""
    seed: int = 0
    """Seed of everything random."""
    out: str | None = None
    """Run directory (local or s3://bucket/prefix). The same command with the same directory resumes."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the chosen method by section: its own, and those of the methods that it builds on. Each is a frozen
    dataclass of `config/options.py`; in files and flags the sections stand beside `data` and `optim`."""

    def options_of(self, kind: type[Section]) -> Section:
        """The section of one type.

        Raises:
            KeyError: the chosen method has none of it.
        """
        for section in self.options.values():
            if type(section) is kind:
                return section
        raise KeyError(f"{self.method} has no {kind.__name__}")


def presets() -> list[str]:
    """Names of the presets that the package ships."""
    folder = resources.files("pipeline.config") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """The values of a preset.

    Raises:
        UserError: there is no such preset.
    """
    if name not in presets():
        raise UserError(f"unknown preset {name!r}{suggest(name, presets())}")
    file = resources.files("pipeline.config") / "presets" / f"{name}.yaml"
    return parse_yaml(file.read_text(), f"preset {name}")


def read_file(uri: str) -> dict[str, Any]:
    """The values of a YAML file at `uri`.

    Raises:
        UserError: it is not there, or no config file; one that is too large for that is not read.
    """
    if file_size(uri) > MAX_YAML_BYTES:
        raise UserError(f"{uri}: larger than 1 MiB; this is no config file")
    return parse_yaml(read_text(uri), uri)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in their place, section by section; an empty section changes nothing.

    Raises:
        UserError: one has keys and values where the other has a single value.
    """
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(before, value)
        elif isinstance(before, Mapping) and value is not None:
            raise UserError(f"{key}: expected keys and values, got {value!r}")
        elif not isinstance(before, Mapping):
            merged[key] = value
    return merged


def as_dict(config: Config) -> dict[str, Any]:
    """The config as plain values: what `cli.resolve` takes, YAML writes and a checkpoint holds."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    options = values.pop("options")
    return {**values, **options}


def to_yaml(config: Config) -> str:
    """The config as YAML; reading it gives the same config."""
    return yaml.safe_dump(as_dict(config), sort_keys=False)


def without_weights(config: Config) -> Config:
    """The config for building networks that are filled afterwards: what `model.weights` names is not read."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, weights="none"))


def identity(config: Config) -> dict[str, Any]:
    """What makes the result what it is: everything but the place, the machines, and what only saves memory."""
    values = as_dict(config)
    del values["model"]["checkpoint_activations"]
    return {key: value for key, value in values.items() if key not in ("out", "scaling", "run")}
