"""The tables of a comparison, the same for the page and for Markdown, and the same numbers for programs as CSV."""

import csv
import io
import statistics
from collections import Counter
from collections.abc import Sequence

from pipeline.report.compare import Comparison, MethodRow, Spread
from pipeline.report.published import Protocol, published
from pipeline.report.render import Table
from pipeline.report.runs import UNKNOWN, Run

NONE = "-"
KINDS = ("last", "gain", "best")
"""What a row has on a split, in the order of the tables."""
TOGETHER = 2
"""Splits up to which they share a table."""
HASH = 12
"""Shown digits of a hash."""
COLUMNS: tuple[str, ...] = (
    "dataset", "protocol", "split", "method", "source", "seeds", "last", "last_sd", "best", "best_sd", "gain",
    "gain_margin", "unfinished", "list_hash", "dataset_hash",
)  # fmt: skip
"""Of the CSV: mIoU and its deviation in percent, the gain and half its 95 % interval in points; else empty."""


def headline(comparison: Comparison) -> str:
    """What the tables are about."""
    return f"{comparison.dataset}, protocol {comparison.protocol}"


def tables(comparison: Comparison) -> list[Table]:
    """Scores and gains by row and split, what was published, and what is missing; empty ones are left out."""
    together = len(comparison.splits) <= TOGETHER
    scores = [_scores(comparison, kinds) for kinds in ((KINDS,) if together else ((kind,) for kind in KINDS))]
    return [table for table in (*scores, _published(comparison), _missing(comparison)) if table.rows]


def _scores(comparison: Comparison, kinds: Sequence[str]) -> Table:
    """A column for each split and kind of which a row has something; the best scores are bold."""
    places = [(split, kind) for split in comparison.splits for kind in kinds]
    found = {
        place: line for place in places if any(line := [_of_kind(comparison, row, *place) for row in comparison.rows])
    }
    counts = [each.seeds for line in found.values() for each in line if each]
    usual = statistics.mode(counts) if counts else 0
    rows = [
        [row.label, *(_cell(kind, line[at], usual) for (_, kind), line in found.items())]
        for at, row in enumerate(comparison.rows)
    ]
    seeds = "one seed" if usual == 1 else f"mean ± deviation of {usual} seeds"
    seeds += "" if len(set(counts)) == 1 else " unless n says other"
    title = _title(comparison.baseline, [kind for kind in kinds if any(kind == each for _, each in found)], seeds)
    names = [split if len(kinds) == 1 else f"{split} {kind}" for split, kind in found]
    best = [_best(line) if kind != "gain" else [] for (_, kind), line in found.items()]
    strong = {(at, column) for column, top in enumerate(best, 1) for at in top}
    return Table(title, ("method", *names), rows if counts else [], strong=strong)


def _of_kind(comparison: Comparison, row: MethodRow, split: str, kind: str) -> Spread | None:
    return {"last": row.last, "best": row.best, "gain": lambda on: comparison.gain(row, on)}[kind](split)


def _title(baseline: str, kinds: Sequence[str], seeds: str) -> str:
    """What a table of scores shows, and how its numbers came about."""
    scores, gains = f"mIoU in %, {seeds}", f"gain over {baseline} in points, ± its 95 % interval"
    if len(kinds) > 1:
        return f"{scores}; {gains}" if "gain" in kinds else scores
    return gains.capitalize() if "gain" in kinds else f"{''.join(kinds).capitalize()} {scores}"


def _cell(kind: str, found: Spread | None, usual: int) -> str:
    """The mean, its deviation or the gain's margin, and the number of seeds if it is not the usual one."""
    if found is None:
        return NONE
    mean, width = (f"{found.mean:+.2f}", found.margin) if kind == "gain" else (f"{found.mean:.2f}", found.sd)
    parts = [mean] if width is None else [mean, f"± {width:.2f}"]
    return " ".join([*parts, *([f"n={found.seeds}"] if found.seeds != usual else [])])


def _best(line: Sequence[Spread | None]) -> list[int]:
    """The places of the highest mean, as it is shown; none where there is nothing to choose from."""
    means = {at: float(_number(each.mean)) for at, each in enumerate(line) if each}
    return [at for at, mean in means.items() if mean == max(means.values())] if len(means) > 1 else []


def _published(comparison: Comparison) -> Table:
    """Each published row with ours of the same name below it."""
    known, rows = published(comparison), []
    for each in known.rows if known else ():
        rows.append([each.label, *(_number(each.scores.get(split)) for split in comparison.splits), each.source])
        for row in filter(each.fits, comparison.rows):
            for kind in ("last", "best"):
                spreads = [getattr(row, kind)(split) for split in comparison.splits]
                rows.append([f"{row.label}, ours", *(_number(found and found.mean) for found in spreads), kind])
    return Table("Published beside ours: mIoU in %", ("method", *comparison.splits, "source"), rows)


def recipes(comparison: Comparison, known: Protocol) -> str:
    """How the published figures were made, and in what ours were made otherwise."""
    ours = [row for row in comparison.rows if any(each.fits(row) for each in known.rows)]
    said = {}
    for row in ours:
        for name, value in known.settings.items():
            if row.options[name] != value:
                said.setdefault(f"{name} {row.options[name]} instead of {value}", []).append(row.label)
        said.setdefault(f"optim.steps {row.options['optim.steps']}", []).append(row.label)
    found = "; ".join(f"{what} ({', '.join(whose)})" for what, whose in said.items())
    return f"{known.recipe} Settings of ours: {found}." if found else known.recipe


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _missing(comparison: Comparison) -> Table:
    rows = []
    for row, split, unfinished, absent in comparison.missing():
        states = "; ".join(map(_state, unfinished)) or NONE
        rows.append([row.label, split, states, " ".join(map(str, absent)) or NONE])
    return Table("Unfinished and missing", ("method", "split", "unfinished", "missing seeds"), rows)


def _state(run: Run) -> str:
    last = run.progress.last
    score = f"last mIoU {100 * last.value:.2f} at step {last.step}" if last else "not evaluated yet"
    return f"seed {run.config.seed}: step {run.progress.step} of {run.config.optim.steps}, {score}"


def classes(comparison: Comparison, split: str) -> Table:
    """IoU by class of the finished runs' last evaluations, mean over seeds, shaded by its value."""
    columns = {row.label: means for row in comparison.rows if (means := _class_means(row, split))}
    names = [comparison.classes[at] if at < len(comparison.classes) else str(at) for at in range(_length(columns))]
    values = [[means[at] for means in columns.values()] for at in range(len(names))]
    known = [value for line in values for value in line if value is not None]
    low, room = min(known, default=0), max(known, default=1) - min(known, default=0) or 1
    shades = [[None if value is None else (value - low) / room for value in line] for line in values]
    rows = [[name, *map(_number, line)] for name, line in zip(names, values, strict=True)]
    return Table(f"IoU by class in %, split {split}, last evaluation", ("class", *columns), rows, shades=shades)


def _class_means(row: MethodRow, split: str) -> list[float | None]:
    found = [run.progress.last.iou for run in row.finished(split) if run.progress.last]
    by_class = [[value for value in line if value is not None] for line in zip(*found, strict=False)]
    return [100 * sum(line) / len(line) if line else None for line in by_class]


def _length(columns: dict[str, list[float | None]]) -> int:
    return min(map(len, columns.values()), default=0)


def production(comparison: Comparison) -> Table:
    """One row for each run: what made it, and what it cost."""
    columns = (
        "run", "method", "split", "seed", "state", "labeled", "list", "version", "torch", "ray", "device", "workers",
        "cost",
    )  # fmt: skip
    rows = []
    for row in comparison.rows:
        for run in (run for split in comparison.splits for run in row.of(split)):
            about, cost = run.about, run.cost
            made = [about.version, *(about.machine.get(name) for name in ("torch", "ray")), _device(run), about.workers]
            state = "finished" if run.finished else f"step {run.progress.step}"
            named = [run.uri, row.label, run.config.split, run.config.seed, state, about.labeled, about.digest]
            spent = None if cost is None else f"{cost[0]:.3f} {cost[1]}"
            rows.append([UNKNOWN if value is None else str(value) for value in (*named, *made, spent)])
    return Table("Runs", columns, rows)


def _device(run: Run) -> str | None:
    machine = run.about.machine
    if not machine:
        return None
    return f"{machine['processor']} ({machine['cpus']} CPUs)" if machine["device"] == "cpu" else str(machine["device"])


def cost(comparison: Comparison) -> str:
    """Hash of the dataset, and the hours of all runs that recorded them."""
    index = f"dataset {comparison.index[:HASH]}" if comparison.index else f"dataset {UNKNOWN}"
    costs, sums = [run.cost for run in comparison.runs if run.cost], Counter[str]()
    for hours, unit in costs:
        sums[unit] += hours  # type: ignore[assignment]
    spent = " + ".join(f"{hours:.2f} {unit}" for unit, hours in sums.items()) or f"cost {UNKNOWN}"
    alone = sum(run.config.data.pseudo_labels is not None and not run.teacher for run in comparison.runs)
    what = "of training and evaluation, without repeated steps"
    what += f" and the teachers of {alone} students, which are not beside them" if alone else ""
    return f"{index}; {spent} {what}, {len(costs)} of {len(comparison.runs)} runs." if costs else f"{index}; {spent}."


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """One line for each row and split, ours and published ones."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for comparison in comparisons:
        place = {"dataset": comparison.dataset, "protocol": comparison.protocol, "dataset_hash": comparison.index or ""}
        for row in comparison.rows:
            writer.writerows({**place, **_line(comparison, row, split)} for split in comparison.splits if row.of(split))
        known = published(comparison)
        for each in known.rows if known else ():
            for split, score in each.scores.items():
                line = {"split": split, "method": each.label, "source": each.source, "best": score}
                writer.writerow({**place, **line})
    return out.getvalue()


def _line(comparison: Comparison, row: MethodRow, split: str) -> dict[str, object]:
    runs, gain = row.of(split), comparison.gain(row, split)
    line: dict[str, object] = {"split": split, "method": row.label, "source": "runs", "seeds": len(row.finished(split))}
    for name, spread in (("last", row.last(split)), ("best", row.best(split))):
        if spread:
            line |= {name: f"{spread.mean:.4f}", f"{name}_sd": "" if spread.sd is None else f"{spread.sd:.4f}"}
    digests = sorted({run.about.digest for run in runs if run.about.digest})
    return {
        **line,
        "gain": "" if gain is None else f"{gain.mean:.4f}",
        "gain_margin": "" if gain is None or gain.margin is None else f"{gain.margin:.4f}",
        "unfinished": sum(not run.finished for run in runs),
        "list_hash": " ".join(digests),
    }
