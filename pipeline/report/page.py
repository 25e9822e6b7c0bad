"""The report on runs, as one HTML page and as Markdown."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import yaml

from pipeline.config.schema import as_dict
from pipeline.report import plots, results
from pipeline.report.compare import Comparison, MethodRow
from pipeline.report.html import Table, html_details, html_figure, html_list, html_page, html_table
from pipeline.report.published import published

LEGEND = (
    "Last and best evaluation of finished runs, mean over seeds with the sample's standard deviation. In brackets the "
    "gain: points of mIoU over SupOnly on the same split with the same steps, labeled batch and backbone (of several "
    "such rows the one with the fewest other differences), mean over the seeds that both have."
)
PICTURE = (
    "Validation images. Entropy: bright where the right-most method is unsure. Reliable: the four fifths of the shown "
    "pixels with the lowest entropy, as U2PL parts them at its start."
)


class ImagePanel(NamedTuple):
    """What networks see."""

    pixels: np.ndarray
    """uint8 [h,w,3]"""
    networks: str
    """Which ones, in words."""


Picture = ImagePanel | str
"""Or why there is none."""


def as_page(
    comparisons: Sequence[Comparison], pictures: Mapping[int, Picture], failed: Mapping[str, str] | None = None
) -> str:
    """One HTML file with everything in it.

    Args:
        comparisons: of the runs.
        pictures: what networks see, by place of the comparison; those that nobody asked for are missing.
        failed: of a sweep, why each failed trial did, by name.
    """
    parts = [_section(each, f"c{at}", pictures.get(at)) for at, each in enumerate(comparisons)]
    table = html_table(_failed(failed), 2) if failed else ""
    return html_page(_title(comparisons), f"<p>{escape(LEGEND)}</p>\n{table}" + "".join(parts))


def as_markdown(comparisons: Sequence[Comparison], failed: Mapping[str, str] | None = None) -> str:
    """The page's tables and notes."""
    blocks = [f"# {_plain(_title(comparisons))}", LEGEND, *([_markdown(_failed(failed))] if failed else [])]
    for each in comparisons:
        known = published(each)
        blocks.append(f"## {_plain(results.headline(each))}")
        blocks += ["\n".join(f"- {_plain(note)}" for note in each.notes())] if each.notes() else []
        blocks += [_markdown(table) for table in results.tables(each)]
        blocks += [_plain(results.recipes(each, known))] if known else []
        blocks += [_markdown(table) for split in each.splits if (table := results.classes(each, split)).rows]
        blocks += [_markdown(results.production(each)), _plain(results.cost(each))]
    return "\n\n".join(blocks) + "\n"


def _failed(failed: Mapping[str, str]) -> Table:
    return Table("Failed trials", ("trial", "why"), [[*each] for each in failed.items()])


def _title(comparisons: Sequence[Comparison]) -> str:
    names = "; ".join(dict.fromkeys(each.dataset for each in comparisons))
    return f"{sum(len(each.runs) for each in comparisons)} runs on {names}"


def _section(comparison: Comparison, name: str, picture: Picture | None) -> str:
    known, tables = published(comparison), [html_table(table, 3) for table in results.tables(comparison)]
    chart = plots.overview(comparison, name)
    if chart:  # where there is room, beside the first table
        tables[0] = f'<div class="side"><div>{tables[0]}</div>{chart}</div>\n'
    parts = [f"<h2>{escape(results.headline(comparison))}</h2>\n", html_list("Notes", comparison.notes(), 3), *tables]
    parts += [f"<p>{escape(results.recipes(comparison, known))}</p>\n" if known else ""]
    for at, split in enumerate(comparison.splits):
        parts.append(_split(comparison, split, f"{name}-{at}", opened=at == 0))
    return "".join([*parts, _picture(picture), _production(comparison)])


def _split(comparison: Comparison, split: str, name: str, *, opened: bool) -> str:
    """Curves and classes of one split; the first is open."""
    charts = plots.curves(comparison, split, f"{name}-miou") + "".join(plots.internals(comparison, split, name))
    table = results.classes(comparison, split)
    body = f'<div class="charts">{charts}</div>\n' + (html_table(table, 3) if table.rows else "")
    return html_details(f"Split {split}: curves and classes", body, opened=opened)


def _picture(picture: Picture | None) -> str:
    if picture is None:
        return ""
    if isinstance(picture, str):
        return f"<h3>What the networks see</h3>\n<p>No pictures: {escape(picture)}</p>\n"
    alt = f"A grid with one validation image a row. {picture.networks} {PICTURE}"
    figure = html_figure(picture.pixels, alt, escape(f"{picture.networks} {PICTURE}"))
    box = '<div class="scroll wide" tabindex="0" role="region" aria-label="What the networks see">'
    return f"<h3>What the networks see</h3>\n{box}{figure}</div>\n"


def _production(comparison: Comparison) -> str:
    table = html_table(results.production(comparison), 3)
    configs = "".join(html_details(f"Config of {row.label}", _config(row)) for row in comparison.rows)
    return f"<h3>What produced it</h3>\n<p>{escape(results.cost(comparison))}</p>\n" + html_details(
        "Runs and configs", table + configs
    )


def _config(row: MethodRow) -> str:
    """The config of the first of its runs; the others differ in split, seed and place."""
    values = as_dict(row.runs[0].config)
    return f'<pre tabindex="0">{escape(yaml.safe_dump(values, sort_keys=False))}</pre>\n'


def _markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join([f"### {_plain(table.title)}", "", *(f"| {' | '.join(map(_plain, line))} |" for line in lines)])


def _plain(text: str) -> str:
    """Text that is neither markup nor the end of a cell."""
    for mark in "\\|<*`[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
