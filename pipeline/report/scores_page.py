"""The scores of a checkpoint as text, as JSON and as a page."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from pipeline.inference.class_table import counted, mean_of, percent
from pipeline.inference.measures import DILATION, Measures, Tally
from pipeline.inference.pictures import class_legend
from pipeline.inference.score_tasks import Job
from pipeline.report.plots import calibration
from pipeline.report.render import Table, render, text_table

ABSENT = {
    "skip": "A class that is neither in the truth nor in a prediction has no IoU, and the means leave it out.",
    "zero": "A class that is neither in the truth nor in a prediction has an IoU of 0, as in the U2PL release.",
}
MEANING = (
    "Accuracy is the share of a class's pixels that is found. Boundary IoU looks at the pixels that are at most "
    f"{100 * DILATION:g} % of the image's diagonal away from the contour of their class. Ignored pixels count nowhere."
)


def as_text(job: Job, tallies: Mapping[str, Tally]) -> str:
    """A table of the classes for each network, what is over all classes, and its mIoU in a last line."""
    lines = []
    for name, tally in tallies.items():
        found = job.measures(tally)
        way = "" if job.usual else f" ({job.recipe.way})"
        lines += [text_table(_classes(job, name, found)), _overall(found)]
        lines.append(f"{job.subset} mIoU {name} {100 * found.miou:.2f}{counted(found.iou)}{way}")
    return "\n".join(lines)


def as_json(job: Job, tallies: Mapping[str, Tally]) -> str:
    """All numbers, unrounded; None where a class has no such number."""
    way = asdict(job.recipe.way)
    networks = {
        name: {
            **asdict(job.measures(tally)),
            "confusion": tally.confusion.matrix.tolist(),
            "reliability": [each._asdict() for each in tally.reliability],
            "images": tally.images,
        }
        for name, tally in tallies.items()
    }
    about = {
        "checkpoint": job.recipe.checkpoint,
        "data": job.dataset.root,
        "subset": job.subset,
        "images": job.images,
        "way": str(job.recipe.way),
        **way,
        "classes": job.dataset.info.classes,
    }
    return json.dumps({**about, "networks": networks}, indent=1) + "\n"


def as_page(job: Job, tallies: Mapping[str, Tally]) -> str:
    """One HTML file with everything in it; the worst images are those of tallies that were asked for pictures."""
    info = job.dataset.info
    return render(
        "scores.html",
        title=f"{job.recipe.checkpoint} on {info.name}: {job.images} {job.subset} images, {job.recipe.way}",
        meaning=f"{ABSENT[job.absent]} {MEANING}",
        legend=class_legend(info, job.subset),
        networks=[
            {
                "name": name,
                "overall": _overall(job.measures(tally)),
                "classes": _classes(job, name, job.measures(tally)),
                "confusion": _confusion(job, tally),
                "reliability": calibration(name, tally.reliability),
                "worst": tally.worst,
            }
            for name, tally in tallies.items()
        ],
    )


def _classes(job: Job, name: str, found: Measures) -> Table:
    """The measures by class in percent, and their means."""
    columns = (found.iou, found.accuracy, found.dice, found.boundary_iou)
    rows = [(title, *(percent(values[at]) for values in columns)) for at, title in enumerate(job.dataset.info.classes)]
    means = ("mean", *(percent(mean_of(values)) for values in columns))
    return Table(
        f"{name}: {job.subset} of {job.dataset.info.name}, {job.images} images, {job.recipe.way}",
        ("class", "IoU", "accuracy", "Dice", "boundary IoU"),
        [*rows, means],
        job.dataset.info.palette,
        [iou or 0.0 for iou in found.iou],
    )


def _overall(found: Measures) -> str:
    return (
        f"pixel accuracy {percent(found.pixel_accuracy)}, "
        f"frequency-weighted IoU {percent(found.frequency_weighted_iou)}, "
        f"calibration error {percent(found.calibration_error)}"
    )


def _confusion(job: Job, tally: Tally) -> Table:
    """Of each true class the share of its pixels that is predicted as each class, in percent."""
    classes, counts = job.dataset.info.classes, tally.confusion.matrix.tolist()
    shares = [[count / sum(row) if sum(row) else None for count in row] for row in counts]
    return Table(
        f"Confusion, {job.recipe.way}: of the pixels of a class (row), the share predicted as a class (column), in %",
        ("class", *classes, "pixels"),
        [(name, *map(percent, row), f"{sum(own):,}") for name, row, own in zip(classes, shares, counts, strict=True)],
        job.dataset.info.palette,
        shades=[[*row, None] for row in shares],
    )
