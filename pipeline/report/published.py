"""Published mIoU on the paper's own protocols, to stand beside ours: where each row comes from and how it was made.

The recipes differ in more than the method, so these are figures to look at, not a line to beat.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.datasets.facts import KNOWN
from pipeline.report.compare import Comparison


@dataclass(frozen=True)
class Published:
    """One row of a published table."""

    label: str
    """The name that our row has, so that the two stand together."""
    scores: Mapping[str, float]
    """mIoU in percent by split."""
    source: str


@dataclass(frozen=True)
class Protocol:
    """The published rows of one protocol."""

    rows: tuple[Published, ...]
    recipe: str
    """How they were made, where we do otherwise."""


_SPLITS = ("1_16", "1_8", "1_4", "1_2", "full")
_RELEASE = "README of the U2PL release"
_ABLATION = "U2PL paper, Tables 4 and A2"
_UNIMATCH = "README of the UniMatch release"

_VOC = (
    "Published U2PL: ResNet-101 with a stem of three 3x3 convolutions, crop 513, 80 epochs, 16 labeled and 16 "
    "unlabeled images a step; the best epoch on val; scored on a 513 centre crop whose padding counts as background. "
    "Here: torchvision's ResNet-101 unless the config says otherwise, whole images, last and best apart."
)
_BLENDER = f"{_VOC} The lists of 662 and 1323 hold images of the 1464 with VOC's own masks alone."
_CITYSCAPES = (
    "Published U2PL: ResNet-101 with a stem of three 3x3 convolutions, crop 769, 200 epochs, 16 labeled and 16 "
    "unlabeled images a step, sliding window. The CPS row is the U2PL authors' rerun; CPS's own paper has higher "
    "figures. Here: torchvision's ResNet-101 unless the config says otherwise."
)
_OTHER = " UniMatch: ResNet-101, crop {}, another recipe."


def _row(label: str, source: str, *scores: float) -> Published:
    return Published(label, dict(zip(_SPLITS, scores, strict=False)), source)


PROTOCOLS: dict[tuple[str, str], Protocol] = {
    ("voc", "classic"): Protocol(
        (
            _row("u2pl", f"{_RELEASE}, VOC classic", 67.98, 69.15, 73.66, 76.16, 79.49),
            _row("unimatch", f"{_UNIMATCH}, VOC classic", 75.2, 77.2, 78.8, 79.9, 81.2),
        ),
        _VOC + _OTHER.format(321),
    ),
    ("voc", "blender"): Protocol(
        (
            _row("u2pl", f"{_RELEASE}, VOC blender", 77.21, 79.01, 79.30, 80.50),
            _row("u2pl (loss=binary)", "U2PL slides, Table A4", 75.36, 76.62, 79.64, 79.80),
            Published("u2pl (negative_pixels=reliable)", {"1_8": 77.30, "1_4": 77.35}, _ABLATION),
            Published("u2pl (negative_pixels=all)", {"1_8": 77.40, "1_4": 77.57}, _ABLATION),
        ),
        _BLENDER,
    ),
    ("cityscapes", "cityscapes"): Protocol(
        (
            _row("suponly", f"{_RELEASE}, Cityscapes", 65.74, 72.53, 74.43, 77.83),
            _row("cps", "U2PL paper, Cityscapes table (rerun)", 69.8, 74.3, 74.6, 76.8),
            _row("u2pl", f"{_RELEASE}, Cityscapes, with CutMix", 70.30, 74.37, 76.47, 79.05),
            Published("u2pl (negative_pixels=reliable)", {"1_4": 75.16, "1_2": 77.19}, _ABLATION),
            Published("u2pl (negative_pixels=all)", {"1_4": 74.51, "1_2": 76.96}, _ABLATION),
            _row("u2pl_ael", f"{_RELEASE}, Cityscapes, with AEL", 74.90, 76.48, 78.51, 79.12),
            _row("unimatch", f"{_UNIMATCH}, Cityscapes", 76.6, 77.9, 79.2, 79.5),
        ),
        _CITYSCAPES + _OTHER.format(801),
    ),
}
"""By dataset of `KNOWN` and protocol."""


def published(comparison: Comparison) -> Protocol | None:
    """What was published on the protocol of a comparison, if its classes are the dataset's."""
    for (name, protocol), known in PROTOCOLS.items():
        if (KNOWN[name].classes, protocol) == (comparison.classes, comparison.protocol):
            return known
    return None
