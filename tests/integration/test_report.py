"""The report as a user makes it, opened in a real browser; runs on a real S3 server."""

import io
from collections.abc import Iterator

import pytest
from PIL import Image

from pipeline import commands, storage
from pipeline.errors import UserError
from pipeline.report.render import render
from tests.browser import PROGRAM, Browser
from tests.s3 import S3Server
from tests.unit.report.made import write_run

OPEN_ALL = "document.querySelectorAll('details').forEach(each => each.open = true)"
TRACKER = "http://127.0.0.1:9/pixel.png"

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two methods on three splits, one run unfinished; without networks to look at."""
    folder = tmp_path_factory.mktemp("runs")
    logs = {
        "kept": lambda step: step / 50, "alpha": lambda step: 1 / step, "entropy_threshold": lambda step: step / 10,
        "bank_fill": lambda step: [0.5, step / 20],
    }  # fmt: skip
    for at, split in enumerate(("1_16", "1_4", "full")):
        for seed in (0, 1):
            score = 0.5 + 0.1 * at + 0.02 * seed
            write_run(folder / f"s-{split}-{seed}", "suponly", split, seed, (score - 0.1, score))
            finished = (split, seed) != ("full", 1)
            config = {"u2pl": {"loss": "binary", "negative_pixels": "reliable", "prototype_ema": True}}
            for name, more in (("u", {}), ("a-long-name-with-no-place-to-break-it-anywhere", config)):
                write_run(
                    folder / f"{name}-{split}-{seed}", "u2pl", split, seed, (score, score + 0.05),
                    finished=finished, logs=logs, config=more,
                )  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def test_the_job_writes_page_markdown_and_csv(runs, tmp_path, capsys):
    out = tmp_path / "made" / "it.html"
    commands.report([runs, "--out", str(out), "--images", "0"])
    assert sorted(path.name for path in out.parent.iterdir()) == ["it.csv", "it.html", "it.md"]
    said = capsys.readouterr().out
    assert "against" in said.partition("Last mIoU in %")[0], "the answer comes first"
    assert said.endswith(f"report {out}\n")
    assert "What the networks see" not in out.read_text()


def test_the_charts_as_files_for_a_paper(runs, tmp_path):
    commands.report([runs, "--out", str(tmp_path / "it.html"), "--images", "0", "--figures", str(tmp_path / "figures")])
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"overview.pdf", "overview.svg", "overview.png", "miou-1_16.pdf", "bank_fill-full.png"} <= names
    assert len(names) == 3 * (1 + 3 * 5)


def test_networks_that_cannot_be_opened_cost_only_the_pictures(runs, tmp_path):
    out = tmp_path / "it.html"
    commands.report([runs, "--out", str(out)])
    assert "No pictures: " in out.read_text()


def test_runs_on_s3(runs, s3: S3Server, tmp_path):
    place = f"{s3.bucket_uri}/{tmp_path.name}"
    for file in storage.list_files(runs):
        if "full" not in file:
            storage.write_bytes(f"{place}/runs/{file}", storage.read_bytes(f"{runs}/{file}"))
    commands.report([f"{place}/runs", "--out", f"{place}/report.html", "--images", "0"])
    assert f"{place}/runs/s-1_16-0".encode() in storage.read_bytes(f"{place}/report.html")
    assert storage.list_files(place)[:3] == ["report.csv", "report.html", "report.md"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out", "x.pdf"], r"--out x\.pdf: must end in \.html"),
        (["--images", "-1"], "--images: must be 0 or more"),
        (["--over", "u2p", "--images", "0"], r"--over u2p: no such method or row; did you mean u2pl\?"),
        (["/nowhere/at/all"], r"/nowhere/at/all: no run there"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(runs, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        commands.report([runs, *flags])
    assert list(tmp_path.iterdir()) == []


@needs_browser
class TestInABrowser:
    @pytest.mark.parametrize("width", [1280, 400])
    def test_the_report(self, runs, browser, tmp_path, width):
        out = tmp_path / "report.html"
        commands.report([runs, "--out", str(out)])
        browser.open(out, width)
        browser.evaluate(OPEN_ALL)
        assert browser.complaints() == []
        assert browser.requests() == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width  # wide tables scroll in their boxes
        titled = "[...document.querySelectorAll('svg.chart')].every(each => each.querySelector('use > title'))"
        assert browser.evaluate(titled), "values that show where a mouse rests"
        assert browser.evaluate("document.querySelectorAll('svg.chart').length") == 1 + 3 * 5
        loaded = "[...document.querySelectorAll('img')].every(each => each.complete && each.naturalWidth > 0)"
        assert browser.evaluate(loaded), "a chart is no picture"
        with Image.open(io.BytesIO(browser.screenshot())) as picture:
            assert picture.width == width
            assert picture.height > 2000
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50
        smallest = (
            "Math.min(...[...document.querySelectorAll('svg.chart')].map(each => each.getBoundingClientRect().width))"
        )
        assert browser.evaluate(smallest) > 330, "narrower, and a chart's text is too small to read"

    def test_its_policy_keeps_what_slips_in_from_fetching(self, browser, tmp_path):
        """The control: without the policy the browser asks, so an empty list above means something."""
        page = render("page.html", title="t").replace("<h1>", f'<img src="{TRACKER}" alt=""><h1>')
        free, kept = tmp_path / "free.html", tmp_path / "kept.html"
        free.write_text(page.replace("Content-Security-Policy", "X-Nothing"))
        kept.write_text(page)
        browser.open(free, 400)
        assert browser.requests() == [TRACKER]
        assert browser.complaints()
        browser.open(kept, 400)
        assert browser.complaints()
        assert not any("net::" in each for each in browser.complaints()), "it was refused, not tried"
