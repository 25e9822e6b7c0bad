"""Pictures of what trained networks see: input, truth, predictions, entropy, and which pixels U2PL would rely on."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from pipeline.config.schema import EvalConfig
from pipeline.datasets.images import shown
from pipeline.datasets.prepared.dataset import Dataset, DatasetInfo, open_dataset
from pipeline.errors import UserError
from pipeline.inference.evaluate import Sample, read_images, spread
from pipeline.inference.load import restore
from pipeline.inference.logits import whole
from pipeline.ops.entropy import relative_entropy

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
RELIABLE: Colour = (128, 205, 138)
UNRELIABLE: Colour = (186, 30, 50)  # much darker, so that the two differ without hue as well
IGNORED: Colour = (150, 150, 150)
RELIABILITY_LEGEND = (("reliable", RELIABLE), ("unreliable", UNRELIABLE))
"""What the colours of `reliability` mean, for the legend of `panel`."""
MIX = 0.5
"""Share of the class colour in an overlay."""
MIN_SIDE = 192
"""Smaller images are enlarged by whole factors until their longer side has this many pixels."""
MAX_SIDE = 512
"""Larger images are shrunk to that."""
THUMBNAIL = 192
"""The longer side of a thumbnail, pixels."""
GAP = 8
MARGIN = 16
FONT_SIZE = 15
LINE = 28
SWATCH = 14
_BACKGROUND: Colour = (255, 255, 255)
_INK: Colour = (40, 44, 52)
_HEAT = np.array([[13, 8, 61], [84, 15, 109], [187, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=np.float32)
"""Dark blue over red to pale yellow: brightness grows with the value, so it reads in grey too."""


def colour_mask(mask: np.ndarray, palette: Sequence[Colour], other: Colour = IGNORED) -> np.ndarray:
    """Class ids as colours.

    Args:
        mask: uint8 or int64 [H,W].
        palette: RGB by class id.
        other: colour of what the palette has none for (ignored).

    Returns:
        uint8 [H,W,3].
    """
    table = np.full((len(palette) + 1, 3), other, dtype=np.uint8)
    table[:-1] = np.asarray(palette, dtype=np.uint8).reshape(-1, 3)
    return table[np.minimum(mask.astype(np.int64), len(palette))]


def class_legend(info: DatasetInfo, subset: str = "val") -> list[tuple[str, Colour]]:
    """The classes of a dataset and their colours; last that of ignored pixels, if masks of the subset have any."""
    ignored = [("ignored", IGNORED)] if info.ignored(subset) else []
    return [*zip(info.classes, info.palette, strict=True), *ignored]


def overlay(image: np.ndarray, mask: np.ndarray, palette: Sequence[Colour]) -> np.ndarray:
    """An image under its mask.

    Args:
        image: uint8 [H,W,3], or of other bands, see `shown`.
        mask: [H,W], as for `colour_mask`.
        palette: RGB by class id.

    Returns:
        uint8 [H,W,3].
    """
    return ((1 - MIX) * shown(image) + MIX * colour_mask(mask, palette)).round().astype(np.uint8)


def side_by_side(
    image: np.ndarray,
    masks: Sequence[np.ndarray],
    palette: Sequence[Colour],
    side: int = THUMBNAIL,
    *,
    over: bool = False,
) -> np.ndarray:
    """A thumbnail of an image, and its masks at the same size beside it.

    Args:
        image: uint8 [H,W,3], or of other bands, see `shown`.
        masks: [H,W] each, as for `colour_mask`.
        palette: RGB by class id.
        side: pixels of the longer side of each, at most.
        over: lay the masks over the image.

    Returns:
        uint8 [h,w,3].
    """
    small = Image.fromarray(shown(image))
    small.thumbnail((side, side))
    gap = np.full((small.height, 4, 3), _BACKGROUND, np.uint8)
    parts = [np.asarray(small)]
    for mask in masks:
        ids = np.asarray(Image.fromarray(mask).resize(small.size, Image.Resampling.NEAREST))
        parts += [gap, overlay(parts[0], ids, palette) if over else colour_mask(ids, palette)]
    return np.concatenate(parts, axis=1)


def heat(values: np.ndarray) -> np.ndarray:
    """Numbers as colours, dark (0) to bright (1).

    Args:
        values: float [H,W], 0..1; what lies outside is clipped.

    Returns:
        uint8 [H,W,3].
    """
    stops = np.linspace(0, 1, len(_HEAT))
    flat = np.clip(np.nan_to_num(values, nan=0.0), 0, 1)
    channels = [np.interp(flat, stops, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def reliability(reliable: np.ndarray) -> np.ndarray:
    """A partition in the colours of `RELIABILITY_LEGEND`: bool [H,W] to uint8 [H,W,3]."""
    yes, no = np.array([RELIABLE, UNRELIABLE], dtype=np.uint8)
    return np.where(reliable[..., None], yes, no)


def panel(
    rows: Sequence[Mapping[str, np.ndarray]],
    titles: Sequence[str],
    legend: Sequence[tuple[str, Colour]] = (),
) -> Image.Image:
    """Draws a grid of pictures with titled columns and a legend below.

    Args:
        rows: one mapping an image, from column title to uint8 [H,W,3]; a column that a row lacks stays empty there.
        titles: the columns, left to right.
        legend: names and their colours, wrapped to the width of the grid.
    """
    font = ImageFont.load_default(FONT_SIZE)
    pictures = [{title: _fitted(row[title]) for title in titles if title in row} for row in rows]
    cell = max([p.width for row in pictures for p in row.values()] + [_length(t, font) for t in titles])
    heights = [max((p.height for p in row.values()), default=0) for row in pictures]
    lefts = [MARGIN + index * (cell + GAP) for index in range(len(titles))]
    width = lefts[-1] + cell + MARGIN
    lines = _wrapped(legend, width - 2 * MARGIN, font)
    foot = MARGIN + LINE + sum(heights) + GAP * len(heights)
    canvas = Image.new("RGB", (width, foot + LINE * len(lines) + MARGIN - GAP), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for title, left in zip(titles, lefts, strict=True):
        draw.text((left + cell / 2, MARGIN + LINE / 2 - GAP / 2), title, _INK, font, anchor="mm")
        top = MARGIN + LINE
        for row, height in zip(pictures, heights, strict=True):
            if title in row:
                canvas.paste(row[title], (left + (cell - row[title].width) // 2, top))
            top += height + GAP
    _draw_legend(draw, lines, foot, font)
    return canvas


def _fitted(picture: np.ndarray) -> Image.Image:
    """A picture in a readable size. Enlarged pixels stay squares."""
    image = Image.fromarray(picture)
    longest = max(image.size)
    if longest > MAX_SIDE:
        return image.resize(
            (image.width * MAX_SIDE // longest, image.height * MAX_SIDE // longest), Image.Resampling.BOX
        )
    factor = -(-MIN_SIDE // longest)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _length(text: str, font: Font) -> int:
    return int(np.ceil(font.getlength(text)))


def _entry_width(name: str, font: Font) -> int:
    """Swatch, name and the space after it."""
    return SWATCH + GAP + _length(name, font) + 2 * GAP


def _wrapped(legend: Sequence[tuple[str, Colour]], width: int, font: Font) -> list[list[tuple[str, Colour]]]:
    """The entries in lines of at most `width` pixels (or one entry)."""
    lines: list[list[tuple[str, Colour]]] = []
    room = 0
    for name, colour in legend:
        if not lines or _entry_width(name, font) - 2 * GAP > room:
            lines.append([])
            room = width
        lines[-1].append((name, colour))
        room -= _entry_width(name, font)
    return lines


def _draw_legend(
    draw: ImageDraw.ImageDraw, lines: Sequence[Sequence[tuple[str, Colour]]], top: int, font: Font
) -> None:
    for line in lines:
        left, middle = MARGIN, top + LINE // 2
        for name, colour in line:
            box = (left, middle - SWATCH // 2, left + SWATCH, middle + SWATCH // 2)
            draw.rounded_rectangle(box, radius=3, fill=colour, outline=_INK)
            draw.text((left + SWATCH + GAP, middle), name, _INK, font, anchor="lm")
            left += _entry_width(name, font)
        top += LINE


UNRELIABLE_SHARE = 0.2
"""Share of the shown pixels that counts as unreliable: alpha_0 of U2PL."""


def compare_networks(runs: Mapping[str, str], count: int) -> np.ndarray:
    """What the networks of some runs see; see `draw`.

    Args:
        runs: run directories by title; dataset and scale are the last one's.
        count: number of validation images.

    Raises:
        UserError: there is no run, or a checkpoint or the dataset cannot be opened.
    """
    if not runs:
        raise UserError("no run is finished")
    restored = {title: restore(uri, torch.device("cpu")) for title, uri in runs.items()}
    config, _ = list(restored.values())[-1]
    networks = {title: method.predictor() for title, (_, method) in restored.items()}
    return draw(networks, open_dataset(str(config.data.root)), config.eval, count)


def draw(networks: Mapping[str, nn.Module], dataset: Dataset, config: EvalConfig, count: int) -> np.ndarray:
    """Draws a grid with one row per validation image.

    Args:
        networks: predictors by title (uint8 [B,3,H,W] -> logits); entropy and reliability are the last one's.
        dataset: its classes and palette; images are taken evenly over the validation set.
        config: the scale at which the networks see the images.
        count: number of rows.

    Returns:
        uint8 [h,w,3].
    """
    samples = read_images(dataset, spread(dataset, count))
    logits = {title: [_logits(network, sample, config) for sample in samples] for title, network in networks.items()}
    uncertain = [relative_entropy(each[0]).cpu().numpy() for each in list(logits.values())[-1]]
    threshold = float(np.quantile(np.concatenate([values.ravel() for values in uncertain]), 1 - UNRELIABLE_SHARE))
    palette = dataset.info.palette
    rows = []
    for index, sample in enumerate(samples):
        seen = {title: each[index].argmax(1)[0].cpu().numpy() for title, each in logits.items()}
        rows.append(
            {
                "input": shown(sample.image),
                "truth": colour_mask(sample.mask, palette),
                **{title: colour_mask(prediction, palette) for title, prediction in seen.items()},
                "entropy": heat(uncertain[index]),
                "reliable": reliability(uncertain[index] < threshold),
            }
        )
    legend = [*class_legend(dataset.info), *RELIABILITY_LEGEND]
    return np.asarray(panel(rows, list(rows[0]), legend))


@torch.no_grad()
def _logits(network: nn.Module, sample: Sample, config: EvalConfig) -> Tensor:
    image = torch.from_numpy(np.ascontiguousarray(sample.image)).permute(2, 0, 1).unsqueeze(0)
    return whole(network, image, config.scale).float()
