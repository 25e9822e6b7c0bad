"""Pieces of self-contained pages: one file without scripts, which fetches nothing and can be read on a phone."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; }
body { max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; } p { max-width: 48rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; white-space: nowrap; }
thead th { border-bottom: 1px solid; white-space: normal; vertical-align: bottom; }
tbody th { font-weight: normal; white-space: normal; min-width: 6rem; max-width: 16rem; overflow-wrap: break-word; }
tr > :first-child { text-align: left; }
tr > :last-child { padding-right: 0; } tr > .shade { padding-left: .5rem; padding-right: .5rem; }
li { overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .8em; height: .8em; border: 1px solid GrayText; margin-right: .4em; }
.bar { display: block; height: .2rem; background: #3d7ebf; }
.name { white-space: nowrap; margin-right: .6em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; }
figcaption { font-size: .9rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.5rem; }
.charts figure { max-width: 36rem; } svg { display: block; width: 100%; height: auto; }
.side { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: center; } .side > div { max-width: 100%; }
.side figure { flex: 1 1 24rem; min-width: 0; max-width: 36rem; margin-top: 1rem; }
.wide img { min-width: 56rem; }
summary { cursor: pointer; padding: .3rem 0; } details { margin-top: 1rem; } details details { margin: 0 1rem; }
pre { overflow-x: auto; background: #f4f5f7; padding: .7rem; font-size: .85rem; }
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
    shades: Sequence[Sequence[float | None]] = ()
    """Depth 0..1 of each cell's background, from the second cell on."""


def text_table(table: Table) -> str:
    """Aligned lines, the first column to the left, without a last newline."""
    lines = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *rows = ("  ".join(map(_aligned, range(len(line)), line, widths)).rstrip() for line in lines)
    return "\n".join([table.title, head, "-" * len(head), *rows])


def _aligned(at: int, cell: str, width: int) -> str:
    return cell.rjust(width) if at else cell.ljust(width)


def html_table(table: Table, level: int = 2) -> str:
    """The table as HTML under a heading, in a box that scrolls sideways where it is too wide."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    body = "".join(f"<tr>{''.join(_cells(table, at, row))}</tr>\n" for at, row in enumerate(table.rows))
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
    title = f"<h{level}>{escape(table.title)}</h{level}>"
    return f"{title}\n{box}<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"


def _cells(table: Table, at: int, row: Sequence[str]) -> list[str]:
    cells = [escape(cell) for cell in row]
    if at < len(table.colors):
        cells[0] = html_name(row[0], table.colors[at])
    if at < len(table.bars):
        cells[1] += f'<span class="bar" style="width:{100 * table.bars[at]:.1f}%"></span>'
    shades = table.shades[at] if at < len(table.shades) else [None] * len(cells)
    body = [f"<td{_shaded(shade)}>{cell}</td>" for cell, shade in zip(cells[1:], shades, strict=False)]
    return [f'<th scope="row">{cells[0]}</th>', *body]


def _shaded(depth: float | None) -> str:
    """Light enough for the text at any depth."""
    return "" if depth is None else f' class="shade" style="background:rgba(61,126,191,{0.6 * depth:.2f})"'


def html_name(name: str, color: tuple[int, int, int]) -> str:
    """A name behind a small square of its colour, which screen readers skip."""
    style = f"background:rgb{tuple(map(int, color))}"
    return f'<span class="name"><span class="swatch" aria-hidden="true" style="{style}"></span>{escape(name)}</span>'


def html_list(title: str, lines: Sequence[str], level: int = 2) -> str:
    """A titled list; nothing if it is empty."""
    items = "".join(f"<li>{escape(line)}</li>\n" for line in lines)
    return f"<h{level}>{escape(title)}</h{level}>\n<ul>\n{items}</ul>\n" if lines else ""


def html_details(summary: str, body: str, *, opened: bool = False) -> str:
    """HTML that is folded away behind its summary, without a script."""
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>\n{body}</details>\n"


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
