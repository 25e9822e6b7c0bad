"""What is known about datasets: classes, colours, way of scoring. A new dataset is one entry of `KNOWN`."""

import colorsys
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pipeline import storage
from pipeline.config.parse import suggest
from pipeline.datasets.prepared.dataset import IGNORE_INDEX
from pipeline.errors import UserError
from pipeline.storage import read_lines

MAX_CLASSES = 255
"""Class ids are bytes, and 255 is the ignore index."""
Color = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One dataset's classes."""

    classes: tuple[str, ...]
    """Names by class id."""
    palette: tuple[Color, ...]
    """RGB colour by class id."""
    evaluation: str = "whole"
    """How val is scored: the whole image, or a sliding window."""
    label_ids: Mapping[int, int] = field(default_factory=dict)
    """Class id (or 255) by the raw value, for sets whose masks hold other numbers than class ids."""
    label_colors: Mapping[int, int] = field(default_factory=dict)
    """Class id (or 255) by 0xRRGGBB, for sets whose masks are colour pictures."""
    colored_masks: bool = False
    """Whether masks are palette PNGs whose palette is `palette`: an index and its colour must then agree."""


def voc_palette(count: int) -> tuple[Color, ...]:
    """The first `count` colours of PASCAL VOC, whose bits spell the class id."""

    def color(index: int) -> Color:
        channels = (sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))
        red, green, blue = channels
        return red, green, blue

    return tuple(color(index) for index in range(count))


def _tone(hue: int, tone: int) -> Color:
    """One of four tones of one of six hues."""
    red, green, blue = colorsys.hsv_to_rgb(hue / 6, 0.9 - 0.15 * tone, 0.55 + 0.15 * tone)
    return round(255 * red), round(255 * green), round(255 * blue)


_HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
_TEXTURES = ("plain", "striped", "checked", "ringed")
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
_ADE20K = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""
KNOWN: dict[str, DatasetSpec] = {
    "shapes": DatasetSpec(
        classes=("background", "disk", "square", "triangle", "cross", "ring"),
        palette=((40, 40, 40), (230, 90, 80), (200, 210, 70), (90, 210, 110), (80, 130, 235), (205, 95, 220)),
    ),
    "lookalikes": DatasetSpec(
        classes=("background", *(f"{hue} {texture}" for hue in _HUES for texture in _TEXTURES)),
        palette=((40, 40, 40), *(_tone(hue, tone) for hue in range(6) for tone in range(4))),
    ),
    "voc": DatasetSpec(classes=tuple(_VOC.split()), palette=voc_palette(21), colored_masks=True),
    "cityscapes": DatasetSpec(
        classes=tuple(name for name, _, _ in _CITYSCAPES),
        palette=tuple(color for _, _, color in _CITYSCAPES),
        evaluation="sliding",
        label_ids={
            **dict.fromkeys(range(34), 255),
            **{label: index for index, (_, label, _) in enumerate(_CITYSCAPES)},
        },
    ),
    "camvid": DatasetSpec(
        classes=(
            "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
            "bicyclist",
        ),
        palette=(
            (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0),
            (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
        ),
        label_ids={**{index: index for index in range(11)}, 11: 255},
    ),
    "ade20k": DatasetSpec(
        classes=tuple(name.strip() for name in _ADE20K.split(",")),
        palette=voc_palette(150),
        label_ids={0: 255, **{index + 1: index for index in range(150)}},
    ),
}  # fmt: skip


def find_spec(text: str) -> DatasetSpec:
    """The spec that a user means.

    Args:
        text: the name of a known dataset, class names separated by commas, or the path of a file. That has a name a
            line, as labelme's `labels.txt` (its `__ignore__` is no class), or a name and its colour: CVAT's
            `labelmap.txt` (`name:r,g,b::`) or a table `name,r,g,b`; the colours then are what masks hold.

    Raises:
        UserError: none of these, a class named twice, or more than 255 of them.
    """
    if text in KNOWN:
        return KNOWN[text]
    colors: dict[str, Color] = {}
    if "," in text:
        names = [name.strip() for name in text.split(",") if name.strip()]
    elif storage.exists(text):
        names, colors = _read_classes(text)
    else:
        near = suggest(text, sorted(KNOWN))
        raise UserError(f"--classes {text!r}: neither a file nor a list a,b,c nor a known dataset{near}")
    if len(set(names)) != len(names) or not 2 <= len(names) <= MAX_CLASSES:
        raise UserError(f"--classes {text}: needs 2 to {MAX_CLASSES} names, none twice; got {len(names)}")
    if not colors:
        return DatasetSpec(classes=tuple(names), palette=voc_palette(len(names)))
    known = {name: index for index, name in enumerate(names)} | {_IGNORED: IGNORE_INDEX}
    ids = {red << 16 | green << 8 | blue: known[name] for name, (red, green, blue) in colors.items()}
    if len(ids) < len(colors):
        raise UserError(f"--classes {text}: two classes have the same colour")
    return DatasetSpec(classes=tuple(names), palette=tuple(colors[name] for name in names), label_colors=ids)


_COLORED = re.compile(
    r"(?P<name>[^,;:\t]+)[,;:\t]\s*(?P<r>\d{1,3})[,;\t ]\s*(?P<g>\d{1,3})[,;\t ]\s*(?P<b>\d{1,3})\s*(:.*)?"
)
"""A name and its colour, as CVAT and CSV tables write them."""
_IGNORED = "__ignore__"
"""labelme's name of pixels that count for nothing; no class."""


def _read_classes(uri: str) -> tuple[list[str], dict[str, Color]]:
    """The names in a file of classes, and their colours if it has them."""
    lines = [line for line in read_lines(uri) if not line.startswith("#")]
    matches = [_COLORED.fullmatch(line) for line in lines]
    if len(lines) > 1 and not matches[0] and all(matches[1:]) and not re.search(r"\d", lines[0]):  # head of a table
        matches = matches[1:]
    if matches and all(matches):
        found = [match.groups() for match in matches if match]
        colors = {name.strip(): (int(red), int(green), int(blue)) for name, red, green, blue, _ in found}
        if max(max(color) for color in colors.values()) > 255:
            raise UserError(f"{uri}: a colour has three numbers of 0 to 255")
        return [name.strip() for name, *_ in found if name.strip() != _IGNORED], colors
    odd = next((line for line in lines if re.search(r"[{}\[\]<>:=,;\t\0\"]|^- | #|^\d+ ", line)), None)
    if odd is not None:
        raise UserError(
            f"{uri}: {odd!r} is no class name; a file of classes has one name a line, or lines name,r,g,b with the "
            "colours of the masks"
        )
    return [line for line in lines if line != _IGNORED], {}


def with_values(spec: DatasetSpec, text: str) -> DatasetSpec:
    """`spec` of a set whose masks hold the values that the user names.

    Args:
        spec: the classes.
        text: VALUE=ID pairs separated by commas, or the path of a file with one a line. All values are numbers
            0..255 or all are colours #RRGGBB; an id is a class id, or 255 for pixels to ignore.

    Raises:
        UserError: not such pairs, a value named twice, or an id that is no class.
    """
    pairs = text.split(",") if "=" in text else read_lines(text)
    found: dict[str, int] = {}
    for pair in filter(None, map(str.strip, pairs)):
        value, _, index = (part.strip() for part in pair.partition("="))
        if not re.fullmatch(r"#[0-9a-fA-F]{6}|\d{1,3}", value) or not re.fullmatch(r"\d{1,3}", index):
            raise UserError(f"--values: {pair!r} is not VALUE=ID, such as 7=0 or #ff8000=255")
        if int(index) not in {*range(len(spec.classes)), IGNORE_INDEX}:
            raise UserError(f"--values: {pair!r}: ids are 0 to {len(spec.classes) - 1}, or 255 for pixels to ignore")
        if found.setdefault(value.lower(), int(index)) != int(index):
            raise UserError(f"--values: {value} is given two ids; name it once")
    colors = {int(value[1:], 16): index for value, index in found.items() if value.startswith("#")}
    numbers = {int(value): index for value, index in found.items() if not value.startswith("#")}
    if bool(colors) == bool(numbers) or max(numbers, default=0) > 255:
        raise UserError("--values: needs numbers 0 to 255 or colours #RRGGBB, and not both")
    return replace(spec, label_ids=numbers, label_colors=colors, colored_masks=False)
