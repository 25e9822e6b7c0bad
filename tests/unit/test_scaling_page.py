"""docs/scaling.md holds what its script prints."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _numbers(lines: list[str], count: int) -> list[list[float]]:
    """The rows of so many numbers, thousands with or without commas, `10^6` for a million."""
    rows = []
    for line in lines:
        powers = re.sub(r"10\^(\d)", lambda found: f"{10 ** int(found[1])}", line)
        if re.match(r"[| ]*\d", powers):
            rows.append([float(each) for each in re.findall(r"\d[\d.]*", powers.replace(",", ""))])
    return [row for row in rows if len(row) == count]


def test_the_tables_are_those_of_the_script() -> None:
    said = subprocess.run(
        [sys.executable, "benchmarks/scaling.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    page = [line for line in (ROOT / "docs" / "scaling.md").read_text().splitlines() if line.startswith("|")]
    steps = [[*row[:6], *row[7:]] for row in _numbers(said, 10)]  # the page has no column for ingest: it hides
    speeds, pools = _numbers(said, 11), _numbers(said, 5)
    assert (len(steps), len(speeds), len(pools)) == (6, 6, 4)
    for row in (*steps, *speeds, *pools):
        near = [each for each in _numbers(page, len(row)) if each == pytest.approx(row, rel=0.02, abs=0.06)]
        assert len(near) == 1, row
