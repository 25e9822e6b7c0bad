"""What is known about datasets: classes, colours, way of scoring. A new dataset is one entry of `KNOWN`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline import storage
from pipeline.config import suggest
from pipeline.errors import UserError

MAX_CLASSES = 255
"""Class ids are bytes, and 255 is the ignore index."""

Color = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One dataset's classes."""

    classes: tuple[str, ...]
    """Names by class id."""
    palette: tuple[Color, ...]
    """RGB colour by class id."""
    evaluation: str = "whole"
    """How val is scored: the whole image, or a sliding window."""
    label_ids: Mapping[int, int] = field(default_factory=dict)
    """Class id (or 255) by the raw value, for sets whose masks hold other numbers than class ids."""


def voc_palette(count: int) -> tuple[Color, ...]:
    """The first `count` colours of PASCAL VOC, whose bits spell the class id."""

    def color(index: int) -> Color:
        channels = (sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))
        red, green, blue = channels
        return red, green, blue

    return tuple(color(index) for index in range(count))


_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
)
_CITYSCAPES: tuple[tuple[str, int, Color], ...] = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
"""Name, label id and colour, in the order of the train ids."""

KNOWN: dict[str, Facts] = {
    "shapes": Facts(
        classes=("background", "disk", "square", "triangle", "cross", "ring"),
        palette=((40, 40, 40), (230, 90, 80), (200, 210, 70), (90, 210, 110), (80, 130, 235), (205, 95, 220)),
    ),
    "voc": Facts(classes=tuple(_VOC.split()), palette=voc_palette(21)),
    "cityscapes": Facts(
        classes=tuple(name for name, _, _ in _CITYSCAPES),
        palette=tuple(color for _, _, color in _CITYSCAPES),
        evaluation="sliding",
        label_ids={
            **dict.fromkeys(range(34), 255),
            **{label: index for index, (_, label, _) in enumerate(_CITYSCAPES)},
        },
    ),
    "camvid": Facts(
        classes=(
            "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
            "bicyclist",
        ),
        palette=(
            (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0),
            (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
        ),
    ),
}  # fmt: skip


def find_facts(text: str) -> Facts:
    """The facts that a user means.

    Args:
        text: the name of a known dataset, class names separated by commas, or the path of a file with one a
            line.

    Raises:
        UserError: none of these, a class named twice, or more than 255 of them.
    """
    if text in KNOWN:
        return KNOWN[text]
    if "," in text:
        names = [name.strip() for name in text.split(",") if name.strip()]
    elif storage.exists(text):
        names = [line.strip() for line in storage.read_bytes(text).decode().splitlines() if line.strip()]
    else:
        near = suggest(text, sorted(KNOWN))
        raise UserError(f"--classes {text!r}: neither a file nor a list a,b,c nor a known dataset{near}")
    if len(set(names)) != len(names) or not 2 <= len(names) <= MAX_CLASSES:
        raise UserError(f"--classes {text}: needs 2 to {MAX_CLASSES} names, none twice; got {len(names)}")
    return Facts(classes=tuple(names), palette=voc_palette(len(names)))
