"""The report on runs, as one HTML page and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml

from pipeline.config.command import command
from pipeline.config.methods import OPTIONS
from pipeline.config.schema import as_dict
from pipeline.report import curves, plots, results
from pipeline.report.answer import answers
from pipeline.report.compare import Comparison, MethodRow
from pipeline.report.published import published
from pipeline.report.render import Table, render
from pipeline.report.spikes import spikes

LEGEND = (
    "Last and best evaluation of finished runs, mean over seeds with the sample's standard deviation; the highest mean "
    "is bold. The gain is over the baseline on the same split with the same steps, labeled batch and backbone (of "
    "several such rows the one with the fewest other differences), seed by seed, over the seeds that both have."
)
PICTURE = (
    "Validation images. Entropy: bright where the right-most method is unsure. Reliable: the four fifths of the shown "
    "pixels with the lowest entropy, as U2PL parts them at its start."
)


class ImagePanel(NamedTuple):
    """A picture of what networks see."""

    pixels: np.ndarray
    """uint8 [h,w,3]"""
    networks: str
    """Which ones, in words."""


Picture = ImagePanel | str
"""A picture, or the reason why there is none."""


def as_page(
    comparisons: Sequence[Comparison], pictures: Mapping[int, Picture], failed: Mapping[str, str] | None = None
) -> str:
    """One HTML file with everything in it.

    Args:
        comparisons: of the runs.
        pictures: what networks see, by place of the comparison; those that nobody asked for are missing.
        failed: of a sweep, why each failed trial did, by name.
    """
    return render(
        "report.html",
        title=_title(comparisons),
        legend=LEGEND,
        picture_legend=PICTURE,
        failed=_failed(failed or {}),
        sections=[_section(each, pictures.get(at)) for at, each in enumerate(comparisons)],
    )


def as_markdown(comparisons: Sequence[Comparison], failed: Mapping[str, str] | None = None) -> str:
    """The page's tables and notes."""
    blocks = [f"# {_plain(_title(comparisons))}", *([_markdown(_failed(failed))] if failed else [])]
    for each in comparisons:
        known = published(each)
        blocks += [f"## {_plain(results.headline(each))}", *map(_plain, answers(each))]
        blocks += ["\n".join(f"- {_plain(note)}" for note in each.notes())] if each.notes() else []
        blocks += [*(_markdown(table) for table in results.tables(each)), LEGEND]
        blocks += [_plain(results.recipes(each, known))] if known else []
        blocks += [_markdown(table) for split in each.splits if (table := results.classes(each, split)).rows]
        blocks += [_markdown(results.production(each)), _plain(results.cost(each)), "### Commands"]
        blocks += ["\n".join(f"    {line}" for row in each.rows for line in _commands(row))]
    return "\n\n".join(blocks) + "\n"


def _failed(failed: Mapping[str, str]) -> Table:
    return Table("Failed trials", ("trial", "why"), [[*each] for each in failed.items()])


def _title(comparisons: Sequence[Comparison]) -> str:
    names = "; ".join(dict.fromkeys(each.dataset for each in comparisons))
    return f"{sum(len(each.runs) for each in comparisons)} runs on {names}"


def _section(comparison: Comparison, picture: Picture | None) -> dict[str, Any]:
    """What the page says of one comparison."""
    known = published(comparison)
    return {
        "headline": results.headline(comparison),
        "answers": answers(comparison),
        "notes": comparison.notes(),
        "tables": results.tables(comparison),
        "overview": plots.overview(comparison),
        "recipes": results.recipes(comparison, known) if known else "",
        "splits": [
            {
                "name": split,
                "charts": curves.of_split(comparison, split),
                "constant": curves.constant(comparison, split),
                "classes": results.classes(comparison, split),
            }
            for split in comparison.splits
        ],
        "spikes": spikes(comparison),
        "picture": picture,
        "cost": results.cost(comparison),
        "production": results.production(comparison),
        "configs": [(row.label, _commands(row), _config(row)) for row in comparison.rows],
    }


def _commands(row: MethodRow) -> list[str]:
    """What trains each of its runs anew, on one line each."""
    return [" ".join(command(run.config, OPTIONS).splitlines()) for run in row.runs]


def _config(row: MethodRow) -> str:
    """The config of the first of its runs; the others differ in split, seed and place."""
    return yaml.safe_dump(as_dict(row.runs[0].config), sort_keys=False)


def _markdown(table: Table) -> str:
    rows = [
        [f"**{_plain(cell)}**" if (at, column) in table.strong else _plain(cell) for column, cell in enumerate(row)]
        for at, row in enumerate(table.rows)
    ]
    lines = [[*map(_plain, table.columns)], ["---"] * len(table.columns), *rows]
    return "\n".join([f"### {_plain(table.title)}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _plain(text: str) -> str:
    """Text that is neither markup nor the end of a cell."""
    for mark in "\\|<*`[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
