"""All that can be learned from one GPU in a few minutes: docs/gpu.md says what each part shows.

    python benchmarks/gpu.py --out FILE.json [--parts a b e] [--budget_s 540] [--data ROOT] [--device cpu]

    a  the tests of tests/gpu             e  a run on Ray Train: steps, checkpoint, evaluation, resume
    b  steps: time, memory, compilation   f  decoding by threads, and launches beside it
    c  U2PL's extra beside --against      g  evaluation, checkpoint, out of memory
    d  kernels, waits and copies

FILE.json is written anew after each part. A part that fails, or that would exceed its share of the budget, is noted
with what it had measured; the others go on. `--device cpu` rehearses all of it with small sizes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WEIGHTS = {"machine": 4, "a": 6, "b": 14, "c": 3, "d": 5, "e": 8, "f": 3, "g": 3}
"""Shares of the budget. What a part leaves falls to those after it."""
GRACE = 5.0
"""Seconds between the signal that asks a part to end and the one that ends it; they are of its share."""
LOG_LINES = 15
"""Of what a part that failed has printed."""
Row = dict[str, Any]


def measure(part: str, settings: Mapping[str, Any], limit: float, folder: Path) -> Row:
    """Runs a part in a process of its own, for `limit` seconds at most.

    Args:
        part: its name.
        settings: see `benchmarks.gpu_parts.Settings`.
        limit: seconds.
        folder: gets what the part prints.

    Returns:
        Its `rows` and `s`, and if it failed the `error` and the end of its `log`.
    """
    rows, log, began = Path(settings["rows"]), folder / "log", time.monotonic()
    rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_parts", part, json.dumps(settings)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # compiled functions and Ray's files end with the folder, and no cluster of this machine is joined
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "RAY_TMPDIR": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    if settings["device"] == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    with log.open("wb") as printed:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        problem = _ended(process, limit)
    found = Row(s=round(time.monotonic() - began, 1))
    written = rows.read_text() if rows.exists() else ""
    found["rows"] = [json.loads(line) for line in written[: written.rfind("\n") + 1].splitlines()]
    if problem:
        lines = log.read_text(errors="replace").splitlines()
        found |= {"error": problem, "log": lines[-LOG_LINES:]}
    return found


def _ended(process: subprocess.Popen[bytes], limit: float) -> str:
    """Waits for a part, and ends it with its time; returns what went wrong, or an empty string."""
    try:
        code = process.wait(max(0.0, limit - GRACE))
        return f"ended with code {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"was ended after its {limit:.0f} s"
    finally:
        for each in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):  # also what it has left behind
                os.killpg(process.pid, each)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown; columns in the order in which they first occur."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([_cell(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    """A value with three digits or more."""
    if not isinstance(value, float):
        return str(value).replace("|", "\\|").replace("\n", " ")
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main() -> None:
    """Runs the parts, writes the file, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, letters = parser.add_argument, [name for name in WEIGHTS if len(name) == 1]
    add("--parts", nargs="+", default=letters, choices=letters, metavar="PART", help="default: all")
    add("--budget_s", type=float, default=540.0, help="seconds for all parts together")
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a file that is there is replaced")
    add("--data", metavar="ROOT", help="a prepared dataset for e, f and g; default: made photographs")
    add("--against", metavar="MODULE:FUNCTION", help="second implementation of U2PL's extra, see u2pl_step.py")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal")
    arguments = parser.parse_args()
    chosen = ["machine", *(name for name in letters if name in arguments.parts)]
    if arguments.against is None:
        chosen = [name for name in chosen if name != "c"]
    ends, results = time.monotonic() + arguments.budget_s, dict[str, Row]()
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        settings = {
            "device": arguments.device, "data": arguments.data or str(folder / "data"), "folder": name,
            "rows": str(folder / "rows.jsonl"), "against": arguments.against,
        }  # fmt: skip
        for place, part in enumerate(chosen):
            left = max(0.0, ends - time.monotonic())
            share = left * WEIGHTS[part] / sum(WEIGHTS[each] for each in chosen[place:])
            found = results[part] = measure(part, settings, share, folder)
            arguments.out.write_text(json.dumps({"command": sys.argv, "parts": results}, indent=1))
            print(f"{part}, {found['s']:.0f} s{': ' * ('error' in found)}{found.get('error', '')}\n")
            print(f"{table(found['rows'])}\n" if found["rows"] else "", flush=True)
            print(*found.get("log", []), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
