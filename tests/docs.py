"""The pages of the documentation, and the blocks of code in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "cluster/README.md", ROOT / "tests/data/README.md"]
)


class Block(NamedTuple):
    """A fenced block."""

    page: str
    line: int
    kind: str
    """What stands behind the fence: `sh` is run by a test, `sh ci` by .ci/run, `sh cluster` needs one or a bucket."""
    text: str

    @property
    def commands(self) -> list[str]:
        """Its lines without comments; continued ones are joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for each in lines if (line := re.sub(r"(^|\s)#\s.*", "", each).strip())]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    name, text = str(page.relative_to(ROOT)), page.read_text()
    found = re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [Block(name, text[: each.start()].count("\n") + 1, each[2], each[3]) for each in found]
