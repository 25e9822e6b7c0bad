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
_PAPER = "U2PL paper, {}"
_RERUN = f"{_PAPER}, rerun by its authors"
_ABLATION = _PAPER.format("Tables 4 and A2")
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
            _row("mean_teacher", _RERUN.format("Table 1"), 51.72, 58.93, 63.86, 69.51, 70.96),
            _row("cutmix_seg", _RERUN.format("Table 1"), 52.16, 63.47, 69.46, 73.73, 76.54),
            _row("pseudoseg", _PAPER.format("Table 1"), 57.60, 65.50, 69.14, 72.41, 73.23),
            _row("pc2seg", _PAPER.format("Table 1"), 57.00, 66.28, 69.78, 73.05, 74.15),
            _row("u2pl", f"{_RELEASE}, VOC classic", 67.98, 69.15, 73.66, 76.16, 79.49),
            _row("unimatch", f"{_UNIMATCH}, VOC classic", 75.2, 77.2, 78.8, 79.9, 81.2),
            _row("unimatch_v2", "UniMatch V2 paper, VOC classic", 86.3, 87.9, 88.9, 90.0, 90.8),
        ),
        _VOC + _OTHER.format(321) + " UniMatch V2: DINOv2-B with DPT, crop 518, a third one.",
        _settings(513),
    ),
    ("voc", "blender"): Protocol(
        (
            _row("suponly", f"{_RELEASE}, VOC blender", 67.87, 71.55, 75.80, 77.13),
            _row("mean_teacher", _RERUN.format("Table 2"), 70.51, 71.53, 73.02, 76.58),
            _row("cutmix_seg", _RERUN.format("Table 2"), 71.66, 75.51, 77.33, 78.21),
            _row("cct", _PAPER.format("Table 2"), 71.86, 73.68, 76.51, 77.40),
            _row("gct", _PAPER.format("Table 2"), 70.90, 73.29, 76.66, 77.98),
            _row("cps", _PAPER.format("Table 2"), 74.48, 76.44, 77.68, 78.64),
            _row("ael", _PAPER.format("Table 2"), 77.20, 77.57, 78.06, 80.29),
            _row("u2pl", f"{_RELEASE}, VOC blender", 77.21, 79.01, 79.30, 80.50),
            _row("u2pl", _PAPER.format("Table A4"), 75.36, 76.62, 79.64, 79.80, loss="binary"),
            _ablated("reliable", s1_8=77.30, s1_4=77.35),
            _ablated("all", s1_8=77.40, s1_4=77.57),
        ),
        _BLENDER,
        _settings(513),
    ),
    ("cityscapes", "cityscapes"): Protocol(
        (
            _row("suponly", f"{_RELEASE}, Cityscapes", 65.74, 72.53, 74.43, 77.83),
            _row("mean_teacher", _RERUN.format("Table 3"), 69.03, 72.06, 74.20, 78.15),
            _row("cutmix_seg", _RERUN.format("Table 3"), 67.06, 71.83, 76.36, 78.25),
            _row("cct", _PAPER.format("Table 3"), 69.32, 74.12, 75.99, 78.10),
            _row("gct", _PAPER.format("Table 3"), 66.75, 72.66, 76.11, 78.34),
            _row("cps", _RERUN.format("Table 3"), 69.78, 74.31, 74.58, 76.81),
            _row("ael", _RERUN.format("Table 3"), 74.45, 75.55, 77.48, 79.01),
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
