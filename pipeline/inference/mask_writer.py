"""The masks of one unit of images, and what else is asked for of each image."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeline import storage
from pipeline.datasets.images import DecodeError, decode_part, encode_png, notes_rotation, read_header, shown
from pipeline.datasets.raw.bands import read_bands
from pipeline.inference.evaluate import ahead
from pipeline.inference.load import load_model
from pipeline.inference.pictures import overlay
from pipeline.inference.ranking import Uncertainty, fingerprint, measure
from pipeline.inference.units import Unit, read_images
from pipeline.models.network import SegmentationModel
from pipeline.ops.entropy import relative_entropy
from pipeline.patience import Patience

OVERLAYS, ENTROPY, PROBABILITIES, VOC = "overlays", "entropy", "probabilities", "voc"
RANK, DIVERSE = "rank", "diverse"
"""The options: what is written beside the masks, a VOC tree, and what is noted of each image for a ranking: how unsure
the network is, and what the image shows."""
JPEG_QUALITY = 90
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp"}
"""Of a photo in a VOC tree, by Pillow's name of its format."""


@dataclass(frozen=True)
class Recipe:
    """What is made of each unit, and where."""

    out: str
    checkpoint: str
    options: tuple[str, ...]

    @property
    def masks(self) -> str:
        """Folder of the masks."""
        return storage.join(self.out, "SegmentationClass" if VOC in self.options else "masks")


@dataclass(frozen=True)
class Predicted:
    """One image that has a mask."""

    name: str
    turned: bool
    """Whether its file notes a rotation that the mask does not follow."""
    uncertainty: Uncertainty | None
    """If it was asked for."""
    fingerprint: tuple[float, ...] | None = None
    """What the image shows, if it was asked for."""


@dataclass(frozen=True)
class UnitRecord:
    """What came of a unit."""

    masks: tuple[Predicted, ...]
    left_out: dict[str, str]
    """Why an image has no mask, by its id."""


def record_file(out: str, unit: Unit) -> str:
    """URI of the record of a unit."""
    return storage.join(out, f"units/{unit.number:07d}.json")


class _Made(NamedTuple):
    """One image that the network has looked at."""

    record: Predicted
    photo: bytes
    kind: str
    """Pillow's name of the file's format."""
    pixels: np.ndarray
    """uint8 [H,W,3]."""
    mask: np.ndarray
    """uint8 [H,W]."""
    entropy: np.ndarray | None
    """uint8 [H,W], 255 is log C."""
    probabilities: np.ndarray | None
    """float16 [C,H,W]."""


class MaskWriter:
    """A network that makes the masks of units. Knows nothing of Ray.

    Of its images it holds three at most: one is read and one is written while one is computed. Only of a pool or
    dataset it also holds the row group that these are in, and the next one.
    """

    def __init__(self, recipe: Recipe, device: str | torch.device) -> None:
        """Loads the network.

        Raises:
            UserError: the checkpoint cannot be used.
        """
        self._recipe = recipe
        self._model = load_model(recipe.checkpoint, device)
        self._patience = Patience(self._model.config.run.storage_patience)
        self._high: list[torch.Tensor] = []
        if DIVERSE in recipe.options:
            network = next(each for each in self._model.network.modules() if isinstance(each, SegmentationModel))
            network.encoder.register_forward_hook(lambda _module, _images, maps: self._high.append(maps.high))

    def write(self, unit: Unit) -> None:
        """Writes what is asked for of each image, and then the unit's record, unless there is one."""
        place = record_file(self._recipe.out, unit)
        if storage.exists(place):
            return
        left_out = {
            key: "lists and URIs cannot hold this name; rename it"
            for key, name in zip(unit.ids, unit.names, strict=True)
            if not name
        }
        masks = tuple(ahead(self._store, self._made(unit, left_out)))
        text = json.dumps(asdict(UnitRecord(masks, left_out)))
        self._patience.retried(lambda: storage.write_bytes(place, text.encode()))

    def _made(self, unit: Unit, left_out: dict[str, str]) -> Iterator[_Made]:
        """Looks at the images of a unit; notes those that cannot be read in `left_out`."""
        for at, data in read_images(unit, self._patience):
            try:
                kind, turned, pixels = self._read(data)
            except DecodeError as error:
                left_out[unit.ids[at]] = " ".join(str(error).split())
                continue
            yield self._look(unit.names[at], data, kind, turned, pixels)

    def _read(self, data: bytes) -> tuple[str, bool, np.ndarray]:
        """Format of a file, whether it notes a rotation that pixels do not follow, and its pixels, uint8 [H,W,B]."""
        if self._model.bands:
            return "TIFF", False, read_bands(data, self._model.bands)
        image = read_header(data)
        return str(image.format), notes_rotation(image), decode_part(image)

    def _look(self, name: str, photo: bytes, kind: str, turned: bool, pixels: np.ndarray) -> _Made:
        options = {*self._recipe.options}
        with torch.no_grad():
            logits = self._model.logits(pixels)
            mask = logits.argmax(0).byte().cpu().numpy()
            relative = relative_entropy(logits) if options & {ENTROPY, RANK} else None
            uncertainty = grey = None
            if relative is not None and RANK in options:
                uncertainty = measure(logits, relative)
            if relative is not None and ENTROPY in options:
                grey = (255 * relative).round().byte().cpu().numpy()
            probabilities = logits.softmax(0).half().cpu().numpy() if PROBABILITIES in options else None
            shows = fingerprint(self._high) if self._high else None
            self._high.clear()
        return _Made(Predicted(name, turned, uncertainty, shows), photo, kind, pixels, mask, grey, probabilities)

    def _store(self, made: _Made) -> Predicted:
        """Writes the files of one image; runs in a thread of its own."""
        name, out = made.record.name, self._recipe.out
        self._put(f"{self._recipe.masks}/{name}.png", palette_png(made.mask, self._model.palette))
        if OVERLAYS in self._recipe.options:
            picture = Image.fromarray(overlay(made.pixels, made.mask, self._model.palette))
            self._put(
                f"{out}/{OVERLAYS}/{name}.jpg", _saved(lambda file: picture.save(file, "JPEG", quality=JPEG_QUALITY))
            )
        if made.entropy is not None:
            self._put(f"{out}/{ENTROPY}/{name}.png", encode_png(made.entropy))
        if made.probabilities is not None:
            values = made.probabilities
            packed = _saved(lambda file: np.savez_compressed(file, probabilities=values))
            self._put(f"{out}/{PROBABILITIES}/{name}.npz", packed)
        if VOC in self._recipe.options:
            # Viewers turn a photo as its file notes, but not its mask; without the note both stay as they are.
            suffix, data = (
                (".png", encode_png(shown(made.pixels)))
                if made.record.turned or made.kind == "TIFF"
                else (SUFFIXES[made.kind], made.photo)
            )
            self._put(f"{out}/JPEGImages/{name}{suffix}", data)
        return made.record

    def _put(self, uri: str, data: bytes) -> None:
        self._patience.retried(lambda: storage.write_bytes(uri, data))


def palette_png(mask: np.ndarray, palette: tuple[tuple[int, int, int], ...]) -> bytes:
    """Class ids, uint8 [H,W], as a PNG whose palette has their colours."""
    image = Image.fromarray(mask)
    image.putpalette([channel for color in palette for channel in color])
    return _saved(lambda file: image.save(file, "PNG"))


def _saved(save: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()
