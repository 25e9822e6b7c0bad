"""What a look through a dataset found, as text and as a page."""

from typing import Any

import numpy as np

from pipeline.datasets.check import Picture, Report
from pipeline.datasets.prepared.dataset import DatasetInfo
from pipeline.inference.pictures import IGNORED, overlay
from pipeline.report.render import Table, render, text_table

NAMED = 12
"""Classes that a row names; further ones are counted."""


def as_text(report: Report) -> str:
    """The findings as text for a terminal, without a last newline."""
    blocks = [text_table(table) for table in _tables(report)]
    for title, lines in (("Problems", report.problems), ("Oddities", report.oddities)):
        blocks.append("\n".join([title, *(f"- {line}" for line in lines)]) if lines else f"{title}: none")
    return "\n\n".join([_title(report), *blocks])


def as_page(report: Report) -> str:
    """One HTML file with everything in it, pictures too."""
    return render(
        "dataset.html",
        title=_title(report),
        problems=report.problems,
        oddities=report.oddities,
        tables=_tables(report),
        samples=[_sample(picture, report.dataset.info) for picture in report.pictures],
    )


def _title(report: Report) -> str:
    info = report.dataset.info
    return f"{info.name}: {sum(info.counts.values())} images, {len(info.classes)} classes, {report.dataset.root}"


def _tables(report: Report) -> list[Table]:
    tables = [_counts(report), _sizes(report), _histogram(report), _splits(report)]
    return [table for table in tables if table.rows]


def _counts(report: Report) -> Table:
    rows = [
        (each.name, str(each.images), str(each.masked), _megabytes(each.image_bytes), _megabytes(each.mask_bytes))
        for each in report.subsets
    ]
    return Table("Images", ("subset", "images", "with mask", "MB images", "MB masks"), rows)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"


def _sizes(report: Report) -> Table:
    rows = [(size, each.name, str(count)) for each in report.subsets for size, count in each.sizes]
    return Table("Commonest sizes", ("width x height", "subset", "images"), rows)


def _histogram(report: Report) -> Table:
    """Share of pixels and number of images by class, in each subset with masks; the last row are ignored pixels."""
    info, subsets = report.dataset.info, [each for each in report.subsets if each.masked]
    shares = [each.pixels / max(1, each.pixels.sum()) for each in subsets]
    rows = []
    for at, name in enumerate([*info.classes, "(ignored)"]):
        cells = [name]
        for each, share in zip(subsets, shares, strict=True):
            cells += [f"{100 * share[at]:.2f}", str(each.images_with[at]) if at < len(info.classes) else ""]
        rows.append(cells)
    columns = [f"{each.name} {what}" for each in subsets for what in ("pixels %", "images")]
    bars = shares[0] / max(shares[0].max(), 1e-9) if shares else ()
    colors = (*info.palette, IGNORED)
    return Table("Classes", ("class", *columns), rows if subsets else [], colors, list(bars))


def _splits(report: Report) -> Table:
    rows = []
    for each in report.splits:
        larger = "-" if each.in_larger is None else f"{each.in_larger} of {each.labeled}"
        more = f" and {len(each.absent) - NAMED} more" if len(each.absent) > NAMED else ""
        absent = ", ".join(each.absent[:NAMED]) + more if each.absent else "-"
        counts = map(str, (each.labeled, each.unlabeled, each.both, each.copies))
        rows.append((f"{each.protocol}/{each.name}", *counts, larger, absent))
    columns = (
        "split",
        "labeled",
        "unlabeled",
        "on both sides",
        "copies across",
        "in the next larger",
        "classes absent",
    )
    return Table("Splits", columns, rows)


def _sample(picture: Picture, info: DatasetInfo) -> dict[str, Any]:
    """An image under its mask, and which classes it shows."""
    present = [at for at in np.unique(picture.mask) if at < len(info.classes)]
    names = ", ".join(info.classes[at] for at in present)
    return {
        "pixels": overlay(picture.image, picture.mask, info.palette),
        "alt": f"{picture.id} under its mask: {names or 'nothing but ignored pixels'}",
        "caption": f"{picture.id} ({picture.note})" if picture.note else picture.id,
        "legend": [(info.classes[at], info.palette[at]) for at in present],
    }
