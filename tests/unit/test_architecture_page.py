"""docs/architecture.md tells the truth about layers and Ray."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def _imports(file: Path) -> Iterator[str]:
    """All modules that a file imports, anywhere in it; `from pipeline import x` is `pipeline.x`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports are not looked at"
            yield from (f"{node.module}.{each.name}" for each in node.names)


def _sources() -> Iterator[tuple[str, Path]]:
    """The modules of the package, each with the package or module of `pipeline/` that it belongs to."""
    for file in sorted((ROOT / "pipeline").rglob("*.py")):
        place = file.relative_to(ROOT / "pipeline").with_suffix("").parts[0]
        if place != "__init__":
            yield place, file


def _table(page: str) -> tuple[dict[str, int], dict[str, bool]]:
    """The row of each package, and whether it is said to know Ray."""
    rows, ray = {}, {}
    for number, names, know in re.findall(r"^\| (\d+) \| (.*?) \| .*? \| (.*?) \|$", page, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            rows[name], ray[name] = int(number), know != "-"
    return rows, ray


def _faults(page: str) -> list[str]:
    rows, ray = _table(page)
    found, seen, knows = [], set(), set()
    for place, file in _sources():
        seen.add(place)
        for module in _imports(file):
            root, _, rest = module.partition(".")
            other = rest.partition(".")[0]
            if root == "pipeline" and other != place and rows.get(other, 0) >= rows.get(place, 99):
                found.append(f"{file.relative_to(ROOT)} imports {other}")
            if root == "ray":
                knows.add(place)
    found += [f"{place}: not in the table" for place in sorted(seen - rows.keys())]
    found += [f"{name}: not in the package" for name in sorted(rows.keys() - seen)]
    return found + [f"{name}: Ray" for name in sorted(rows) if ray[name] != (name in knows)]


def test_the_layers_are_those_of_the_code() -> None:
    assert _faults(PAGE) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("| 10 | `sweep`", "| 1 | `sweep`", "imports training"),
        ("| 9 | `report`", "| 7 | `report`", "imports inference"),
        ("`ops`, `batch`", "`ops`", "batch: not in the table"),
        ("`ops`, `batch`", "`ops`, `batch`, `losses`", "losses: not in the package"),
        ("charts, pages | -", "charts, pages | Data", "report: Ray"),
        ("jobs on it | core, Data, Train", "jobs on it | -", "cluster: Ray"),
    ],
)
def test_a_slip_in_the_table_is_caught(old: str, new: str, told: str) -> None:
    assert old in PAGE
    assert told in "\n".join(_faults(PAGE.replace(old, new)))


def test_private_modules_of_ray_are_imported_in_one_place() -> None:
    private = r"ray\..*(\b_|\bgenerated\b|\binternal_)"
    users = {str(file.relative_to(ROOT)) for _, file in _sources() if any(re.match(private, m) for m in _imports(file))}
    assert users == {"pipeline/cluster/internals.py"}


def test_no_command_imports_ray_before_it_connects() -> None:
    code = "import sys, pipeline.__main__, pipeline.commands, pipeline.methods; print('ray' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"
