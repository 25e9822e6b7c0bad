"""A trained method back from its checkpoint: as a model for images, or with all its networks."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline import checkpoint, storage
from pipeline.batch import padding_of
from pipeline.config import cli
from pipeline.config.methods import OPTIONS
from pipeline.config.schema import Config, RunConfig, without_weights
from pipeline.datasets.images import DecodeError, decode_image
from pipeline.datasets.prepared.dataset import Dataset, open_dataset
from pipeline.datasets.raw.bands import Bands, read_bands
from pipeline.errors import UserError
from pipeline.inference.logits import sliding, whole
from pipeline.methods import Method, build_method
from pipeline.models.weights import SAFETENSORS

WEIGHTS_FILE = "model.safetensors"
"""What `u2pl export --format safetensors` writes."""


class Description(NamedTuple):
    """What is known of a trained network without its weights."""

    config: Config
    """Of its run."""
    classes: tuple[str, ...]
    """Names by class id."""
    about: Mapping[str, Any]
    """What its run was made of and with, see `checkpoint.save`."""


class Model:
    """A trained network, ready for images; `load_model` makes it."""

    def __init__(self, config: Config, method: Method, classes: Sequence[str], about: Mapping[str, Any]) -> None:
        self.config = config
        self.classes = tuple(classes)
        """Names by class id."""
        self.palette = tuple(map(tuple, about["palette"]))
        """RGB colour, 0..255, by class id."""
        self.network = method.predictor()
        """uint8 [B,3,H,W], RGB, or of `bands` -> float logits [B,C,h,w]."""
        self.bands = bands_of(about)
        """What images are made of; None: they are RGB."""
        self._sliding = (config.eval.mode if config.eval.mode != "dataset" else about["evaluation"]) == "sliding"
        self._device = next(method.parameters()).device

    def logits(self, image: str | Path | Image.Image | np.ndarray) -> Tensor:
        """Logits of one image, computed as the run's evaluation does: whole or window by window.

        Args:
            image: path or URI of a file, a Pillow image, or RGB as uint8 [H,W,3]. Of a network for other `bands` a TIFF
                or PNG with these bands, or uint8 [H,W,B], scaled as `bands.ranges` says.

        Returns:
            float32 logits [C,H,W] at the image's own size, on the model's device.

        Raises:
            UserError: the image cannot be read.
        """
        pixels = torch.from_numpy(_pixels(image, self.bands).copy()).to(self._device).permute(2, 0, 1).unsqueeze(0)
        config = self.config.eval
        with torch.no_grad(), autocast(self._device, self.config.run):
            if self._sliding:
                colour = padding_of(self.config.data.mean if self.bands else ())
                return sliding(self.network, pixels, config.window, config.scale, colour)[0]
            return whole(self.network, pixels, config.scale)[0]

    def predict(self, image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """The most likely class of each pixel: uint8 [H,W]. Takes and raises what `logits` does."""
        return self.logits(image).argmax(0).to(torch.uint8).cpu().numpy()


def load_model(run: str | Path, device: str | torch.device = "cpu") -> Model:
    """The network that a run has trained: the teacher where the method scores it, else the student.

    Args:
        run: as `find_network` takes it.
        device: `cpu`, `cuda`, `cuda:1`.

    Raises:
        UserError: there is none of them, it is damaged, or its networks are not those of this version.
    """
    place, target = find_network(str(run)), torch.device(device)
    config, classes, about = describe(place)
    if not {"palette", "evaluation"} <= about.keys():
        raise UserError(
            f"{place}: made by an older version, which noted no palette; train it anew or evaluate it there"
        )
    method = _exported(place, config, len(classes), target) if is_export(place) else restore(place, target)[1]
    return Model(config, method, classes, about)


def find_network(uri: str) -> str:
    """The place of a trained network: a checkpoint folder, or the file of an export.

    Args:
        uri: run directory (its newest checkpoint is taken), checkpoint folder, or an export as safetensors: the folder
            or the file itself; local or a URI.

    Raises:
        UserError: there is none of them.
    """
    if is_export(uri):
        return uri
    weights = storage.join(uri, WEIGHTS_FILE)
    return weights if storage.exists(weights) else checkpoint.find(uri)


def is_export(place: str) -> bool:
    """Whether a place of `find_network` is the file of an export."""
    return place.endswith(SAFETENSORS)


def is_described(place: str) -> bool:
    """Whether a safetensors file says what network it is, as exports do; those of others hold an encoder alone.

    Raises:
        UserError: it cannot be read.
    """
    with _damage_told(place):
        return "u2pl" in _header(place).get("__metadata__", {})


def describe(place: str) -> Description:
    """What is known of the network at a place of `find_network`; its weights are not read.

    Raises:
        UserError: it cannot be read.
    """
    if not is_export(place):
        meta = checkpoint.read_meta(place)
        return Description(cli.resolve(meta.config, OPTIONS), tuple(meta.data["classes"]), meta.about)
    with _damage_told(place):
        known = json.loads(_header(place)["__metadata__"]["u2pl"])
        return Description(cli.resolve(known["config"], OPTIONS), tuple(known["classes"]), known["about"])


def _header(place: str) -> dict[str, Any]:
    """What stands at the head of a safetensors file."""
    size = int.from_bytes(storage.read_range(place, 0, 8), "little")
    return json.loads(storage.read_range(place, 8, min(size, storage.file_size(place))))


def _exported(place: str, config: Config, num_classes: int, device: torch.device) -> Method:
    """The method of an export; its parts beside the network stay as they are built, and nothing uses them."""
    from safetensors.torch import load

    with _damage_told(place):
        state = load(storage.read_bytes(place))
        method = build_method(without_weights(config), num_classes)
        method.predictor().load_state_dict(state)
    return method.to(device).eval()


@contextmanager
def _damage_told(place: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: damaged, or no export of this version ({why}); export the run again") from error


def bands_of(about: Mapping[str, Any]) -> Bands | None:
    """What the images of a run are made of, as its checkpoints note it; None: they are RGB."""
    if "bands" not in about:
        return None
    return Bands(tuple(about["bands"]), tuple((low, high) for low, high in about["ranges"]))


def read_pixels(data: bytes, bands: Bands | None) -> np.ndarray:
    """The pixels of a file as a network takes them: RGB, uint8 [H,W,3], or [H,W,B] of these bands.

    Raises:
        DecodeError: damaged, or without them.
    """
    return decode_image(data) if bands is None else read_bands(data, bands)


def _pixels(image: str | Path | Image.Image | np.ndarray, bands: Bands | None) -> np.ndarray:
    """uint8 [H,W,3], or [H,W,B] of other bands."""
    if isinstance(image, str | Path):
        try:
            return read_pixels(storage.read_bytes(str(image)), bands)
        except DecodeError as error:
            raise UserError(f"{image}: {error}") from error
    pixels = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image
    channels = len(bands.chosen) if bands else 3
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
        raise UserError(f"image: expected uint8 [H,W,{channels}], got {pixels.dtype} {list(pixels.shape)}")
    return pixels


def restore(uri: str, device: torch.device) -> tuple[Config, Method]:
    """Builds the method that a checkpoint holds, with its weights and all its state.

    Args:
        uri: a checkpoint folder, or a run directory, whose newest checkpoint is taken.
        device: where to put it.

    Raises:
        UserError: there is no checkpoint, it is damaged, or its networks are not those of this version.
    """
    place = checkpoint.find(uri)
    meta = checkpoint.read_meta(place)
    config = cli.resolve(meta.config, OPTIONS)
    method = build_method(without_weights(config), len(meta.data["classes"]))
    state = checkpoint.read_state(place)["method"]
    try:
        method.load_state_dict(state)
    except RuntimeError as error:  # torch lists every key; one line is enough
        raise UserError(f"{place}: made by another version, whose {config.method} has other networks") from error
    return config, method.to(device).eval()


def open_data(config: Config, classes: Sequence[str], data: str | None) -> Dataset:
    """The dataset that a run's network of these classes is to be looked at with: `data`, or the one of its run.

    Raises:
        UserError: it cannot be opened, or has other classes, or the same ones in another order.
    """
    dataset = open_dataset(data or str(config.data.root))
    bands, own_bands = len(dataset.info.bands) or 3, len(config.data.mean) or 3
    if bands != own_bands:
        raise UserError(f"{dataset.root} has images of {bands} bands, the network takes {own_bands}")
    theirs = dataset.info.classes
    if len(theirs) != len(classes):
        raise UserError(f"{dataset.root} has {len(theirs)} classes, the checkpoint {len(classes)}")
    for number, (name, own) in enumerate(zip(theirs, classes, strict=True)):
        if name.strip("_").lower() != own.strip("_").lower():  # labelme calls the background _background_
            raise UserError(
                f"{dataset.root}: class {number} is {name}, but {own} in the checkpoint; prepare the dataset with the "
                "checkpoint's classes, in its order"
            )
    return dataset


def any_device() -> torch.device:
    """A GPU if this process sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def task_device() -> torch.device:
    """Where a task of Ray computes; on CPUs with one thread, as each core has a task of its own."""
    torch.set_num_threads(1)
    return any_device()


def autocast(device: torch.device, config: RunConfig) -> torch.autocast:
    """A context in which forward passes have the precision of `run.precision`: autocast to 16 bits, or float32.

    From then on this process lets the convolutions that stay float32 round to TF32 on GPUs, unless it is `fp32`.
    """
    torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    half = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, half, enabled=config.precision in ("bf16", "fp16"))
