"""Drawings as part of a page, not as pictures in it: their marks tell their values without a script."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from markupsafe import Markup

_REFERRED = re.compile(rb'(\bid="|#)([a-z][0-9a-f]{10}\b)')
"""The ids of matplotlib that something refers to; those of one page must differ from drawing to drawing."""
_DROPPED = ("metadata", "style")
"""Who drew it and in which format; rules that would hold for the whole page, so that page.html has them."""


def inline_svg(drawing: bytes, name: str, label: str, titles: Mapping[str, Sequence[str]]) -> Markup:
    """A drawing of matplotlib as an element of a page.

    Args:
        drawing: SVG.
        name: of the drawing.
        label: what it shows in words, for those who do not see it.
        titles: by id of a group, the text that each of its marks shows where a mouse rests on it.
    """
    own = hashlib.sha256(name.encode() + drawing).hexdigest()[:8].encode()
    picture = ElementTree.fromstring(_REFERRED.sub(rb"\g<1>" + own + rb"-\g<2>", drawing))
    for each in [*picture.iter()]:
        each.tag = _bare(each.tag)
        each.attrib = {_bare(name): value for name, value in each.attrib.items()}
        for child in [child for child in each if _bare(child.tag) in _DROPPED]:
            each.remove(child)
    for each in [*picture.iter()]:
        for mark, text in zip(each.iter("use"), titles.get(each.get("id", ""), ()), strict=False):
            ElementTree.SubElement(mark, "title").text = text
        if each.tag == "g":
            each.attrib.pop("id", None)  # nothing refers to those
    picture.attrib = {"viewBox": picture.attrib["viewBox"], "class": "chart", "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(picture, encoding="unicode"))


def _bare(name: str) -> str:
    """A name without its namespace, of which HTML knows nothing."""
    return name.rpartition("}")[2]
