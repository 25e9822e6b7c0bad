"""A trained method back from its checkpoint: as a model for images, and its score."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline import checkpoint, storage
from pipeline.config import cli
from pipeline.config.schema import Config, RunConfig
from pipeline.datasets.images import DecodeError, decode_image
from pipeline.datasets.prepared.dataset import Dataset, open_dataset
from pipeline.errors import UserError
from pipeline.inference.evaluate import Scores, evaluate
from pipeline.inference.predict import sliding, whole
from pipeline.methods import OPTIONS, Method, Predictor, build_method


class Model:
    """A trained network, ready for images; `load_model` makes it."""

    def __init__(self, config: Config, method: Method, classes: Sequence[str], about: Mapping[str, Any]) -> None:
        self.config = config
        self.classes = tuple(classes)
        """Names by class id."""
        self.palette = tuple(map(tuple, about["palette"]))
        """RGB colour, 0..255, by class id."""
        self.network = method.predictor()
        """uint8 [B,3,H,W], RGB -> float logits [B,C,h,w]."""
        self._sliding = (config.eval.mode if config.eval.mode != "dataset" else about["evaluation"]) == "sliding"
        self._device = next(method.parameters()).device

    def logits(self, image: str | Path | Image.Image | np.ndarray) -> Tensor:
        """Logits of one image, computed as the run's evaluation does: whole or window by window.

        Args:
            image: path or URI of a JPEG or PNG, a Pillow image, or RGB as uint8 [H,W,3].

        Returns:
            float32 logits [C,H,W] at the image's own size, on the model's device.

        Raises:
            UserError: the image cannot be read.
        """
        pixels = torch.from_numpy(_pixels(image).copy()).to(self._device).permute(2, 0, 1).unsqueeze(0)
        config = self.config.eval
        with torch.no_grad(), autocast(self._device, self.config.run):
            if self._sliding:
                return sliding(self.network, pixels, config.window, config.scale)[0]
            return whole(self.network, pixels, config.scale)[0]

    def predict(self, image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """The most likely class of each pixel: uint8 [H,W]. Takes and raises what `logits` does."""
        return self.logits(image).argmax(0).to(torch.uint8).cpu().numpy()


def load_model(run: str | Path, device: str = "cpu") -> Model:
    """The network that a run has trained: the teacher where the method scores it, else the student.

    Args:
        run: run directory (its newest checkpoint is taken) or checkpoint folder, local or a URI.
        device: `cpu`, `cuda`, `cuda:1`.

    Raises:
        UserError: there is no checkpoint, it is damaged, or its networks are not those of this version.
    """
    place = checkpoint.find(str(run))
    config, method = restore(place, torch.device(device))
    meta = checkpoint.read_meta(place)
    if not {"palette", "evaluation"} <= meta.about.keys():
        raise UserError(
            f"{place}: made by an older version, which noted no palette; train it anew or evaluate it there"
        )
    return Model(config, method, meta.data["classes"], meta.about)


def _pixels(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """RGB, uint8 [H,W,3]."""
    if isinstance(image, str | Path):
        try:
            return decode_image(storage.read_bytes(str(image)))
        except DecodeError as error:
            raise UserError(f"{image}: {error}") from error
    pixels = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"image: expected uint8 [H,W,3], got {pixels.dtype} {list(pixels.shape)}")
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
    bare = replace(config, model=replace(config.model, weights="none"))  # the checkpoint has them all
    method = build_method(bare, len(meta.data["classes"]))
    state = checkpoint.read_state(place)["method"]
    try:
        method.load_state_dict(state)
    except RuntimeError as error:  # torch lists every key; one line is enough
        raise UserError(f"{place}: made by another version, whose {config.method} has other networks") from error
    return config, method.to(device).eval()


def score(uri: str, data: str | None, device: torch.device) -> tuple[Dataset, dict[str, Scores]]:
    """Scores every network of a checkpoint as the training loop does.

    Args:
        uri: checkpoint folder or run directory.
        data: prepared dataset; None: the one of the run.
        device: where to compute.

    Returns:
        The dataset, and the scores by network; the first network is the method's result.

    Raises:
        UserError: checkpoint or dataset cannot be used, or they have different classes.
    """
    config, method = restore(uri, device)
    dataset = open_dataset(data or str(config.data.root))
    if len(dataset.info.classes) != method.num_classes:
        raise UserError(f"{dataset.root} has {len(dataset.info.classes)} classes, the checkpoint {method.num_classes}")
    scores = {}
    for name, network in method.networks().items():
        with autocast(device, config.run):
            scores[name] = evaluate(Predictor(network), dataset, config.eval, device).scores()
    return dataset, scores


def autocast(device: torch.device, config: RunConfig) -> torch.autocast:
    """A context in which forward passes have the precision of `run.precision`: bfloat16 autocast, or float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
