"""Published mIoU on the paper's own protocols, to stand beside ours: where each row comes from and how it was made.

The recipes differ in more than the method, so these are figures to look at, not a line to beat.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.datasets.specs import KNOWN
from pipeline.report.compare import Comparison, MethodRow


@dataclass(frozen=True)
class Published:
    """One row of a published table."""

    method: str
    scores: Mapping[str, float]
    """mIoU in percent by split."""
    source: str
    options: Mapping[str, str] = field(default_factory=dict)
    """Those of `ABLATED` that are not U2PL's defaults."""

    @property
    def label(self) -> str:
        """The method, and what is not its default."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method} ({options})" if options else self.method

    def fits(self, row: MethodRow) -> bool:
        """Whether a row of ours is of the same method and ablation."""
        wanted = {**ABLATED, **self.options}
        return row.method == self.method and all(
            row.options.get(f"u2pl.{name}", value) == value for name, value in wanted.items()
        )


@dataclass(frozen=True)
class Protocol:
    """The published rows of one protocol."""

    rows: tuple[Published, ...]
    recipe: str
    """How they were made, where we do otherwise whatever the config says."""
    settings: Mapping[str, Any]
    """How they were made, by our dotted keys."""


ABLATED = {"loss": "contrastive", "negative_pixels": "unreliable"}
"""U2PL's options that published tables vary, with their defaults."""
_SPLITS = ("1_16", "1_8", "1_4", "1_2", "full")
_RELEASE = "README of the U2PL release"
_ABLATION = "U2PL paper, Tables 4 and A2"
_UNIMATCH = "README of the UniMatch release"
_VOC = (
    "Published by the U2PL authors: ResNet-101 with a stem of three 3x3 convolutions, 80 epochs, the best one on val, "
    "scored on a 513 centre crop whose padding counts as background. Ours: torchvision's stem, last and best apart, "
    "every pixel of val."
)
_BLENDER = f"{_VOC} The lists of 662 and 1323 hold images of the 1464 with VOC's own masks alone."
_CITYSCAPES = (
    "Published by the U2PL authors: ResNet-101 with a stem of three 3x3 convolutions, 200 epochs, sliding window. The "
    "CPS row is their rerun; CPS's own paper has higher figures. Ours: torchvision's stem, last and best apart."
)
_OTHER = " UniMatch: ResNet-101, crop {}, another recipe."


def _row(method: str, source: str, *scores: float, **options: str) -> Published:
    return Published(method, dict(zip(_SPLITS, scores, strict=False)), source, options)


def _ablated(negative_pixels: str, **scores: float) -> Published:
    by_split = {split.lstrip("s"): score for split, score in scores.items()}
    return Published("u2pl", by_split, _ABLATION, {"negative_pixels": negative_pixels})


def _settings(crop: int) -> dict[str, Any]:
    batch = {"optim.batch_labeled": 16, "optim.batch_unlabeled": 16}
    return {"model.backbone": "resnet101", "data.crop": [crop, crop], **batch}


PROTOCOLS: dict[tuple[str, str], Protocol] = {
    ("voc", "classic"): Protocol(
        (
            _row("suponly", f"{_RELEASE}, VOC classic", 45.77, 54.92, 65.88, 71.69, 72.50),
            _row("u2pl", f"{_RELEASE}, VOC classic", 67.98, 69.15, 73.66, 76.16, 79.49),
            _row("unimatch", f"{_UNIMATCH}, VOC classic", 75.2, 77.2, 78.8, 79.9, 81.2),
        ),
        _VOC + _OTHER.format(321),
        _settings(513),
    ),
    ("voc", "blender"): Protocol(
        (
            _row("suponly", f"{_RELEASE}, VOC blender", 67.87, 71.55, 75.80, 77.13),
            _row("u2pl", f"{_RELEASE}, VOC blender", 77.21, 79.01, 79.30, 80.50),
            _row("u2pl", "U2PL slides, Table A4", 75.36, 76.62, 79.64, 79.80, loss="binary"),
            _ablated("reliable", s1_8=77.30, s1_4=77.35),
            _ablated("all", s1_8=77.40, s1_4=77.57),
        ),
        _BLENDER,
        _settings(513),
    ),
    ("cityscapes", "cityscapes"): Protocol(
        (
            _row("suponly", f"{_RELEASE}, Cityscapes", 65.74, 72.53, 74.43, 77.83),
            _row("cps", "U2PL paper, Cityscapes table (rerun)", 69.8, 74.3, 74.6, 76.8),
            _row("u2pl", f"{_RELEASE}, Cityscapes, with CutMix", 70.30, 74.37, 76.47, 79.05),
            _ablated("reliable", s1_4=75.16, s1_2=77.19),
            _ablated("all", s1_4=74.51, s1_2=76.96),
            _row("u2pl_ael", f"{_RELEASE}, Cityscapes, with AEL", 74.90, 76.48, 78.51, 79.12),
            _row("unimatch", f"{_UNIMATCH}, Cityscapes", 76.6, 77.9, 79.2, 79.5),
        ),
        _CITYSCAPES + _OTHER.format(801),
        _settings(769),
    ),
}
"""By dataset of `KNOWN` and protocol."""


def published(comparison: Comparison) -> Protocol | None:
    """What was published on the protocol of a comparison, if its classes are the dataset's."""
    for (name, protocol), known in PROTOCOLS.items():
        if (KNOWN[name].classes, protocol) == (comparison.classes, comparison.protocol):
            return known
    return None
