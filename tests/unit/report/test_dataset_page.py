"""The report on a dataset: the same facts as text and as a page that needs nothing but itself."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pipeline.datasets import check as checking
from pipeline.datasets.check import Picture, Report, check
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.report.dataset_page import as_page, as_text

EVIL = '<img src="http://x/y.png" onerror=alert(1)>'


class Tags(HTMLParser):
    """Start tags with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "input", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def report(shapes: str) -> Report:
    return check(open_dataset(shapes))


def test_text(report):
    text = as_text(report)
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines()}
    assert lines["train"][1:3] == ["400", "400"]
    assert lines["val"][1:3] == ["150", "150"]
    shares = [float(lines[name][1]) for name in (*report.dataset.info.classes, "(ignored)")]
    assert sum(shares) == pytest.approx(100, abs=0.1)
    assert lines["random/1_8"] == ["random/1_8", "50", "350", "0", "0", "50", "of", "50", "-"]
    assert text.endswith("Problems: none\n\nOddities: none")


def test_page_is_well_formed_and_asks_for_nothing(report):
    page = as_page(report)
    tags = Tags(page)
    assert tags.open == []
    assert "http:" not in page
    assert "https:" not in page
    assert {tag for tag, _ in tags.found} & {"script", "link", "iframe"} == set()
    assert any("width=device-width" in str(each.get("content")) for each in tags.of("meta"))
    assert [each["name"] for each in tags.of("meta") if "name" in each] == ["viewport"]
    pictures = tags.of("img")
    assert len(pictures) == checking.PICTURES
    for each in pictures:
        assert "under its mask: background" in str(each["alt"])
        data = base64.b64decode(str(each["src"]).removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).size == (64, 64)


def test_findings_and_names_are_text_and_never_markup(report):
    picture = Picture(EVIL, "only ignored pixels", np.zeros((4, 6, 3), np.uint8), np.full((4, 6), 255, np.uint8))
    bad = Report(report.dataset, report.subsets, report.splits, [f"{EVIL} is missing"], ["odd"], [picture])
    tags = Tags(as_page(bad))
    assert len(tags.of("img")) == 1
    assert tags.of("img")[0]["alt"] == f"{EVIL} under its mask: nothing but ignored pixels"
    assert f"{EVIL} is missing" in tags.text
    assert "onerror" not in tags.of("img")[0]
    assert as_text(bad).endswith(f"Problems\n- {EVIL} is missing\n\nOddities\n- odd")


def test_the_overlay_mixes_image_and_class_colour(report):
    image, mask = np.full((2, 2, 3), 100, np.uint8), np.array([[0, 1], [2, 255]], np.uint8)
    only = Report(report.dataset, [], [], [], [], [Picture("a", "", image, mask)])
    source = str(Tags(as_page(only)).of("img")[0]["src"])
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
    palette = np.array(report.dataset.info.palette)
    assert np.abs(pixels[0].astype(int) - (100 + palette[:2]) / 2).max() <= 0.5
    assert pixels[1, 1].tolist() == [125, 125, 125]
