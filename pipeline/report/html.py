"""Pieces of self-contained pages: one file without scripts, which fetches nothing and can be read on a phone."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid; } th:first-child, td:first-child { text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
li { overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .8em; height: .8em; border: 1px solid GrayText; margin-right: .4em; }
.bar { display: block; height: .2rem; background: #3d7ebf; }
.name { white-space: nowrap; margin-right: .6em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; }
figcaption { font-size: .9rem; overflow-wrap: anywhere; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the same for a page and for a terminal."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    colors: Sequence[tuple[int, int, int]] = ()
    """RGB of a swatch before each row's first cell, or fewer."""
    bars: Sequence[float] = ()
    """Length of a bar below each row's second cell, 0..1 of its width."""


def text_table(table: Table) -> str:
    """Aligned lines, the first column to the left, without a last newline."""
    lines = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *rows = ("  ".join(map(_aligned, range(len(line)), line, widths)).rstrip() for line in lines)
    return "\n".join([table.title, head, "-" * len(head), *rows])


def _aligned(at: int, cell: str, width: int) -> str:
    return cell.rjust(width) if at else cell.ljust(width)


def html_table(table: Table) -> str:
    """The table as HTML, in a box that scrolls sideways where it is too wide."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    body = "".join(f"<tr>{''.join(_cells(table, at, row))}</tr>\n" for at, row in enumerate(table.rows))
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
    return f"<h2>{escape(table.title)}</h2>\n{box}<table><tr>{head}</tr>\n{body}</table></div>\n"


def _cells(table: Table, at: int, row: Sequence[str]) -> list[str]:
    cells = [escape(cell) for cell in row]
    if at < len(table.colors):
        cells[0] = html_name(row[0], table.colors[at])
    if at < len(table.bars):
        cells[1] += f'<span class="bar" style="width:{100 * table.bars[at]:.1f}%"></span>'
    return [f"<td>{cell}</td>" for cell in cells]


def html_name(name: str, color: tuple[int, int, int]) -> str:
    """A name behind a small square of its colour, which screen readers skip."""
    style = f"background:rgb{tuple(map(int, color))}"
    return f'<span class="name"><span class="swatch" aria-hidden="true" style="{style}"></span>{escape(name)}</span>'


def html_list(title: str, lines: Sequence[str]) -> str:
    """A titled list; nothing if it is empty."""
    items = "".join(f"<li>{escape(line)}</li>\n" for line in lines)
    return f"<h2>{escape(title)}</h2>\n<ul>\n{items}</ul>\n" if lines else ""


def html_figure(picture: np.ndarray, alt: str, caption: str) -> str:
    """A picture inside the page.

    Args:
        picture: uint8 [h,w,3].
        alt: what it shows, for those who do not see it.
        caption: HTML.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{picture.shape[1]}" height="{picture.shape[0]}"'
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" {size}>'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def html_page(title: str, body: str) -> str:
    """A whole page; its policy forbids the browser to fetch or run anything."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )
