"""Tables as text, and pages out of templates: one file without scripts, which fetches nothing and fits a phone.

The templates in `templates/` escape what they are given, and their policy forbids a browser to fetch or run anything;
the page of `u2pl demo` alone has a script, which asks its own server.
"""

import base64
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from PIL import Image


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
    strong: Collection[tuple[int, int]] = ()
    """Row and column of cells in bold."""


def text_table(table: Table) -> str:
    """Aligned lines, the first column to the left, without a last newline."""
    lines = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *rows = ("  ".join(map(_aligned, range(len(line)), line, widths)).rstrip() for line in lines)
    return "\n".join([table.title, head, "-" * len(head), *rows])


def _aligned(at: int, cell: str, width: int) -> str:
    return cell.rjust(width) if at else cell.ljust(width)


def render(template: str, **values: Any) -> str:
    """A page of a template with values; all text in them stays text."""
    return _environment().get_template(template).render(values)


def _environment() -> jinja2.Environment:
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    pages.filters |= {"png": png_uri, "jpeg": jpeg_uri}
    return pages


def png_uri(picture: np.ndarray) -> str:
    """A picture, uint8 [h,w,3], as a place that a page holds in itself."""
    return _picture_uri(picture, "png")


def jpeg_uri(picture: np.ndarray) -> str:
    """The same for photos, which take a tenth of the space so."""
    return _picture_uri(picture, "jpeg")


def _picture_uri(picture: np.ndarray, form: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, form)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"
