"""How the package is built: files, lines, functions, knobs, cycles, and the modules that one U2PL step passes through.

    python benchmarks/house.py [CHECKOUT]

CHECKOUT is another checkout of this repository, such as a worktree of an earlier commit; what it does not have is
shown as `-`. Nothing is timed.
"""

import ast
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

BLOCK = 8
"""Equal lines, one after the other, that make a duplicated block; imports and closing brackets do not count."""
STEP = """
import sys, threading
import torch
from pipeline.batch import Batch, Views
from pipeline.methods import Step, build_method, make_config
from pipeline.ops.world import World

def views(masked):
    image = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    mask = torch.randint(0, 6, (2, 32, 32)) if masked else None
    return Views(image, mask, torch.ones(2, 32, 32, dtype=torch.bool), ("a", "b"))

config = make_config({"method": "u2pl", "optim.steps": 10}, preset="demo")
method, seen = build_method(config, 6).train(), set()
def note(frame, event, arg):
    name = frame.f_code.co_filename
    if "/pipeline/" in name:
        seen.add(name[name.index("/pipeline/") + 1:])
sys.setprofile(note)
for index in (3, 4):
    step = Step(index, 10, 0, World())
    torch.stack(list(method(Batch(views(True), views(False)), step).terms.values())).sum().backward()
    method.after_step(step)
sys.setprofile(None)
print(*sorted(seen))
"""
KNOBS = """
from pipeline.methods import make_config
from pipeline.config.schema import as_dict
def leaves(values):
    return sum(leaves(each) if isinstance(each, dict) else 1 for each in values.values())
print(*(leaves(as_dict(make_config({"method": name}))) for name in ("suponly", "u2pl")))
"""
KNOBS_BEFORE = KNOBS.replace("pipeline.config.schema", "pipeline.config")


def main() -> None:
    """Prints the table of this checkout, or of the one that is named."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    sources = {file: file.read_text() for file in sorted((root / "pipeline").rglob("*.py"))}
    lines = [len(text.splitlines()) for text in sources.values()]
    functions = [length for text in sources.values() for length in function_lines(text)]
    modules = said(root, STEP)
    tests = [len(file.read_text().splitlines()) for file in (root / "tests").rglob("*.py")]
    rows = {
        "files": len(sources),
        "lines": sum(lines),
        "files per thousand lines": f"{1000 * len(sources) / sum(lines):.1f}",
        "lines of a file, median / p90 / max": spread(lines),
        "lines of a function, median / p90 / max": spread(functions),
        "knobs of a suponly and of a u2pl run": " / ".join(said(root, KNOBS) or said(root, KNOBS_BEFORE)) or "-",
        "modules of one U2PL step": len(modules) or "-",
        "their lines": sum(len((root / name).read_text().splitlines()) for name in modules) or "-",
        "import cycles": len(cycles(imports(root, sources))),
        f"duplicated blocks of {BLOCK} lines": duplicates(sources.values()),
        "lines of tests that name something private": private(root),
        "lines of tests per line of source": f"{sum(tests) / sum(lines):.2f}",
    }
    for name, value in rows.items():
        print(f"{name:<44} {value}")


def spread(values: list[int]) -> str:
    """Median, 90 % quantile and maximum."""
    return f"{statistics.median(values):.0f} / {statistics.quantiles(values, n=10)[-1]:.0f} / {max(values)}"


def function_lines(text: str) -> Iterator[int]:
    """Lines of each function without its docstring."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            yield (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def said(root: Path, code: str) -> list[str]:
    """The words that a script prints with a checkout's package; none if it does not run there."""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


def imports(root: Path, sources: dict[Path, str]) -> dict[str, set[str]]:
    """By module, which others it imports when it is imported itself."""
    names = {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in sources}
    found: dict[str, set[str]] = {}
    for name, file in names.items():
        found[name] = set()
        for node in ast.parse(sources[file]).body:
            if isinstance(node, ast.ImportFrom) and node.module in names:
                for each in node.names:
                    inner = f"{node.module}.{each.name}"
                    found[name].add(inner if inner in names else node.module or "")
    return found


def cycles(graph: dict[str, set[str]]) -> set[str]:
    """The modules that import themselves by way of others."""
    reached = {name: set(found) for name, found in graph.items()}
    while True:
        grown = {name: found | {far for near in found for far in reached[near]} for name, found in reached.items()}
        if grown == reached:
            return {name for name, found in reached.items() if name in found}
        reached = grown


def duplicates(texts: Iterable[str]) -> int:
    """Runs of equal lines that stand in two places, counted once for each run of `BLOCK` lines."""
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        body = [line.strip() for line in text.splitlines()]
        kept = [line for line in body if len(line) > 3 and not line.startswith(("from ", "import ", "#", '"""'))]
        counts.update(tuple(kept[at : at + BLOCK]) for at in range(len(kept) - BLOCK + 1))
    return sum(count > 1 for count in counts.values())


def private(root: Path) -> int:
    """Lines of tests that reach for a name that begins with an underscore, of a module or an object of the package.

    What others call so does not count: named tuples' `_replace`, and libraries whose own tests have no other way.
    """
    found = 0
    for file in (root / "tests").rglob("*.py"):
        for line in file.read_text().splitlines():
            imported = re.match(r"\s*from pipeline\S* import .*\b_[a-z]", line)
            named = re.search(r"(?<!self)(?<!cls)(?<!torch)(?<!ray)(?<!autoscaler)\.(?!_replace|_fields)_[a-z]", line)
            found += bool(imported or named)
    return found


if __name__ == "__main__":
    main()
