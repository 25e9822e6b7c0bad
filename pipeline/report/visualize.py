"""What a run's method sees in images, as pictures: `look` in rows, and features of pixels on a plane."""

import io
from collections.abc import Sequence
from functools import partial

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pipeline import checkpoint, storage
from pipeline.datasets.prepared.dataset import Dataset
from pipeline.errors import UserError
from pipeline.inference.evaluate import read_images, spread
from pipeline.inference.load import open_data, restore
from pipeline.inference.look import drawn, drawn_negatives, look
from pipeline.inference.pictures import MAX_SIDE
from pipeline.inference.plane import Points, pca, points, tsne
from pipeline.methods import Step
from pipeline.ops.world import World
from pipeline.patience import retried
from pipeline.report.plots import STYLE

SIZE = (8.0, 4.4)
"""Of the picture of two planes, in inches."""
LEGEND = 7
"""Names in a line of its legend."""


def visualize(
    run: str, out: str, device: torch.device, *, data: str | None, images: Sequence[str], count: int, step: int | None
) -> list[str]:
    """Draws what the method of a run sees, from its checkpoint.

    Args:
        run: run directory (its newest checkpoint is taken), or checkpoint folder.
        out: folder or URI to write into.
        device: where to compute.
        data: prepared dataset; None: the one of the run.
        images: ids of validation images.
        count: how many evenly spread ones, if none is named.
        step: at which step of the run the method parts the pixels, from 0; None: the checkpoint's last.

    Returns:
        The URIs of what was written: pictures.png, negatives.png where the method takes negatives, plane.png.

    Raises:
        UserError: there is no checkpoint, dataset or image of that name, or a number is out of range.
    """
    if count < 1:
        raise UserError(f"--count {count}: must be 1 or more")
    place = checkpoint.find(run)
    config, method = restore(place, device)
    meta = checkpoint.read_meta(place)
    dataset = open_data(config, meta.data["classes"], data)
    total, done = config.optim.steps, meta.step
    if step is not None and not 0 <= step < total:
        raise UserError(f"--step {step}: the run has the steps 0 to {total - 1}")
    samples = read_images(dataset, images or spread(dataset, count))
    if not samples:
        raise UserError(f"{dataset.root}: no validation images; prepare the dataset with a val list")
    at = Step(done - 1 if step is None else step, total, config.seed, World())
    looks = look(method, samples, dataset, config, at, MAX_SIDE)
    if step is not None and looks[0].reliable is None:
        raise UserError(f"--step {step}: {config.method} parts no pixels at any step; leave the flag out")
    pictures = {"pictures": drawn(looks, dataset)}
    if looks[0].negative is not None:
        pictures["negatives"] = drawn_negatives(looks, dataset)
    pictures["plane"] = drawn_plane(points(method, samples, config), dataset)
    written = []
    for name, picture in pictures.items():
        uri, buffer = storage.join(out, f"{name}.png"), io.BytesIO()
        picture.save(buffer, "png")
        retried(partial(storage.write_bytes, uri, buffer.getvalue()))
        written.append(uri)
    return written


def drawn_plane(found: Points, dataset: Dataset) -> Image.Image:
    """The points by PCA and by t-SNE, in the dataset's colours; keys of a memory bank are crosses."""
    flat, shares = pca(found.features)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        left, right = figure.subplots(1, 2)
        _scatter(left, flat, found, dataset)
        left.set_title(f"PCA ({100 * shares[0]:.0f} % and {100 * shares[1]:.0f} % of the variance)")
        _scatter(right, tsne(found.features), found, dataset)
        right.set_title("t-SNE")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=LEGEND, markerscale=2)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer).convert("RGB")


def _scatter(axes: Axes, place: Tensor, found: Points, dataset: Dataset) -> None:
    """The points at `place`, float [n,2]: keys below pixels, as there may be more of them."""
    info = dataset.info
    colours = torch.tensor(info.palette)[found.label] / 255
    keys = found.stored
    axes.scatter(*place[keys].T, c=colours[keys].numpy(), marker="x", s=9, linewidths=0.5)
    axes.scatter(*place[~keys].T, c=colours[~keys].numpy(), marker="o", s=9, edgecolors="#1f2328", linewidths=0.25)
    for c in found.label.unique().tolist():
        axes.scatter([], [], color=[value / 255 for value in info.palette[c]], marker="o", s=9, label=info.classes[c])
    if keys.any():
        axes.scatter([], [], color="#1f2328", marker="x", s=9, label="key: a negative of this class")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
