"""README and docs: links lead somewhere, every block of code says who runs it, and the first screen is one."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs import PAGES, ROOT, Block, blocks

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
RUN = {"sh": "tests/integration/test_docs.py", "sh ci": ".ci/run", "sh cluster": "nobody here"}
SHOWN = {"text", "mermaid"}
PYTHON = {"docs/README.md", "docs/adding-a-method.md", "docs/adding-a-backbone.md", "docs/adding-a-transform.md"}
"""Their Python is run by tests/integration/test_docs.py, and by test_adding.py of tests/unit/methods and models."""


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What headings are called in links, as GitHub makes it."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    bare = [re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in bare}


def dead_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere; the network is not asked."""
    dead = []
    for link in LINK.findall(prose(page)):
        place, _, anchor = unquote(link).partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](gone.md) [d](page.md#one)\n```sh\n[e](x.md)\n```\n")
    assert dead_links(page) == ["#two", "gone.md"]


@pytest.mark.parametrize(
    "block", [each for page in PAGES for each in blocks(page)], ids=lambda each: f"{each.page}:{each.line}"
)
def test_every_block_says_who_runs_it(block: Block) -> None:
    assert block.kind in {*RUN, *SHOWN, "python"}
    if block.kind == "python":
        assert block.page in PYTHON


def test_ci_runs_the_readmes_test_command() -> None:
    (block,) = [each for each in blocks(ROOT / "README.md") if each.kind == "sh ci"]
    assert block.commands == ["make test"]
    assert "README.md" in (ROOT / ".ci/run").read_text()


def test_make_knows_the_targets_that_pages_name() -> None:
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = " ".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= known


def test_the_first_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 120
    first = lines.index("make demo")
    assert any("docs/images/demo.png" in line for line in lines[:first]), "the picture comes before the command"
    assert first < 30
