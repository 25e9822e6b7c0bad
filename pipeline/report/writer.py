"""Writes the report on runs: what was recorded, and what their networks see."""

from collections.abc import Mapping, Sequence

from pipeline import storage
from pipeline.config.methods import OPTIONS
from pipeline.config.parse import suggest
from pipeline.errors import UserError
from pipeline.report import curves, plots, results
from pipeline.report.compare import BASELINE, Comparison, compare
from pipeline.report.page import ImagePanel, Picture, as_markdown, as_page
from pipeline.report.plots import Chart
from pipeline.report.runs import find_runs, read_run


def write_report(
    places: Sequence[str],
    out: str,
    images: int,
    failed: Mapping[str, str] | None = None,
    figures: str | None = None,
    over: str = BASELINE,
) -> list[Comparison]:
    """Compares runs and writes a page, and the same tables as Markdown and CSV beside it.

    Args:
        places: run directories, or folders or URIs that hold some.
        out: page to write.
        images: validation images to show; 0: none.
        failed: of a sweep, why each failed trial did, by name.
        over: method, or label of a row, that gains are over.
        figures: folder for the charts, each as PDF, SVG and PNG; None: none.

    Raises:
        UserError: `out` or `images` cannot be, no run is found, or one is damaged.
    """
    if not out.endswith(".html"):
        raise UserError(f"--out {out}: must end in .html; .md and .csv are written beside it")
    if images < 0:
        raise UserError("--images: must be 0 or more")
    comparisons = compare([read_run(uri, OPTIONS) for uri in find_runs(places)], OPTIONS, over)
    known = {name for each in comparisons for row in each.rows for name in (row.method, row.label)}
    if over not in {BASELINE, *known}:
        raise UserError(f"--over {over}: no such method or row{suggest(over, sorted(known))}")
    pictures = {at: _picture(each, images) for at, each in enumerate(comparisons) if images}
    stem = out.removesuffix(".html")
    for ending, text in (
        ("html", as_page(comparisons, pictures, failed)),
        ("md", as_markdown(comparisons, failed)),
        ("csv", results.as_csv(comparisons)),
    ):
        storage.write_bytes(f"{stem}.{ending}", text.encode())
    if figures:
        for at, each in enumerate(comparisons):
            place = storage.join(figures, str(at)) if len(comparisons) > 1 else figures
            for chart in _charts(each):
                for kind in plots.FORMATS:
                    storage.write_bytes(storage.join(place, f"{chart.name}.{kind}"), chart.drawn(kind))
    return comparisons


def _charts(comparison: Comparison) -> list[Chart]:
    of_splits = [chart for split in comparison.splits for chart in curves.of_split(comparison, split)]
    return [*filter(None, [plots.overview(comparison)]), *of_splits]


def _picture(comparison: Comparison, images: int) -> Picture:
    """What the networks of two runs see, or why it cannot be drawn."""
    from pipeline.inference.pictures import compare_networks  # needs torch, and the rest of a report does not

    shown = comparison.shown()
    try:
        pixels = compare_networks({row.label: run.uri for row, run in shown}, images)
    except (UserError, OSError) as error:
        return str(error)
    runs = ", ".join(f"{row.label} (split {run.config.split}, seed {run.config.seed})" for row, run in shown)
    return ImagePanel(pixels, f"Networks, from the left: {runs}.")
