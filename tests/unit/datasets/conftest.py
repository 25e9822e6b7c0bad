"""Tiny raw trees, written file by file so that a test can spoil any of them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pipeline.datasets.specs import DatasetSpec, voc_palette

SIZE = (24, 32)


class Trees:
    """What tests build raw trees of; images are 24 high and 32 wide."""

    spec = DatasetSpec(classes=("ground", "thing", "other"), palette=voc_palette(3))

    @staticmethod
    def encode(pixels: np.ndarray, form: str = "PNG", mode: str | None = None) -> bytes:
        """`pixels` as a file; `mode` reads the bytes as another Pillow mode (P gets VOC's palette)."""
        image = Image.fromarray(pixels)
        if mode:
            image = Image.frombytes(mode, image.size, pixels.tobytes())
        if mode == "P":
            image.putpalette([channel for color in voc_palette(256) for channel in color])
        buffer = io.BytesIO()
        image.save(buffer, form)
        return buffer.getvalue()

    @classmethod
    def image(cls, form: str = "JPEG", channels: int = 3, mode: str | None = None) -> bytes:
        """A picture of noise."""
        pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, channels), np.uint8)
        return cls.encode(pixels.squeeze(), form, mode)

    @classmethod
    def turned(cls, orientation: int) -> bytes:
        """A picture of noise as a phone stores it; `orientation` is that of EXIF."""
        image = Image.fromarray(np.random.default_rng(orientation).integers(0, 255, (*SIZE, 3), np.uint8))
        exif = image.getexif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", exif=exif)
        return buffer.getvalue()

    @staticmethod
    def ids(seed: int = 0) -> np.ndarray:
        """A mask of 0, 1, 2 and 255."""
        return np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), SIZE)

    @classmethod
    def mask(cls, seed: int = 0) -> bytes:
        """The file of such a mask, with a palette as VOC has."""
        return cls.encode(cls.ids(seed), mode="P")

    @staticmethod
    def put(path: Path, data: bytes | str) -> None:
        """Writes a file and the folders above it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    @classmethod
    def voc(cls, root: Path, train: int = 4, val: int = 2, extra: int = 0, masked: int | None = None) -> Path:
        """A VOC tree: train a0.. (only the first `masked` have a mask), val v0.., in no list e0.."""
        names = [f"a{i}" for i in range(train)], [f"v{i}" for i in range(val)]
        for name in [*names[0], *names[1], *(f"e{i}" for i in range(extra))]:
            cls.put(root / "JPEGImages" / f"{name}.jpg", cls.image())
        for seed, name in enumerate([*names[0][:masked], *names[1]]):
            cls.put(root / "SegmentationClass" / f"{name}.png", cls.mask(seed))
        for list_name, ids in zip(("train", "val"), names, strict=True):
            cls.put(root / "ImageSets" / "Segmentation" / f"{list_name}.txt", "\n".join(ids))  # no last newline
        return root

    @classmethod
    def sbd(cls, root: Path, train: str, val: str) -> Path:
        """A tree of SBD; `train` and `val` are names separated by blanks, each with an image and a mask of ones."""
        for name in [*train.split(), *val.split()]:
            cls.put(root / "img" / f"{name}.jpg", cls.image())
            cls.put(root / "cls" / f"{name}.mat", cls.mat(np.ones(SIZE, np.uint8)))
        for list_name, ids in (("train", train), ("val", val)):
            cls.put(root / f"{list_name}.txt", ids.replace(" ", "\n"))
        return root

    @staticmethod
    def mat(pixels: np.ndarray) -> bytes:
        """A mask file as SBD has them."""
        boundaries = np.empty((20, 1), object)
        boundaries[:, 0] = [np.zeros((1, 1), np.uint8)] * 20
        buffer = io.BytesIO()
        savemat(buffer, {"GTcls": {"Boundaries": boundaries, "Segmentation": pixels, "CategoriesPresent": [[1]]}})
        return buffer.getvalue()


@pytest.fixture
def trees() -> type[Trees]:
    return Trees
