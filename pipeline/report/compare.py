"""Runs side by side: which may be compared, means over seeds, gains, what is missing."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

from pipeline.config.cli import Sections
from pipeline.config.schema import Config, identity
from pipeline.datasets.prepared.splits import FRACTIONS
from pipeline.report.runs import Run

BASELINE = "suponly"
"""The method that gains are over unless a report is told another one."""
SUBJECT = "u2pl"
"""The method that pictures show, if there are runs of it."""
BUDGET = ("optim.steps", "optim.batch_labeled", "model.backbone", "model.decoder", "model.weights")
"""What a gain needs to have in common with its baseline, beside dataset, protocol and split."""
NAMED = 4
"""Runs or rows that a note names; further ones are counted."""
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11)
"""0.975 quantiles of Student's t distribution with 1, 2, ... degrees of freedom; more seeds take the last."""


class Spread(NamedTuple):
    """Some runs' mIoU in percent, or differences of it in points."""

    mean: float
    sd: float | None
    """Sample standard deviation; None of a single run."""
    seeds: int

    @property
    def margin(self) -> float | None:
        """Half the width of the mean's 95 % confidence interval, by Student's t; None of a single run."""
        if self.sd is None:
            return None
        return STUDENT[min(self.seeds - 1, len(STUDENT)) - 1] * self.sd / self.seeds**0.5


def spread(values: Sequence[float]) -> Spread | None:
    """Of shares 0..1; None of nothing."""
    percent = [100 * value for value in values]
    if not percent:
        return None
    return Spread(statistics.fmean(percent), statistics.stdev(percent) if len(percent) > 1 else None, len(percent))


@dataclass(frozen=True, eq=False)
class MethodRow:
    """The runs of one method with one set of options: all splits, all seeds."""

    label: str
    """The method, and in brackets what differs from the other rows."""
    method: str
    options: Mapping[str, Any]
    """Every setting by dotted key, but those that the table is over."""
    runs: Sequence[Run]

    def of(self, split: str) -> list[Run]:
        """The runs on a split, by seed."""
        return sorted((run for run in self.runs if run.config.split == split), key=lambda run: run.config.seed)

    def finished(self, split: str) -> list[Run]:
        """Those of them that are done."""
        return [run for run in self.of(split) if run.finished]

    def last(self, split: str) -> Spread | None:
        """The last evaluations of the finished runs."""
        return spread([run.progress.last.value for run in self.finished(split) if run.progress.last])

    def best(self, split: str) -> Spread | None:
        """Their best evaluations."""
        return spread([run.progress.best.value for run in self.finished(split) if run.progress.best])

    def distance(self, other: "MethodRow") -> int:
        """In how many settings two rows differ, beside options of methods."""
        sections = {item.name for item in fields(Config)}
        shared = [name for name in self.options if name.partition(".")[0] in sections]
        return sum(self.options[name] != other.options[name] for name in shared)

    @property
    def budget(self) -> tuple[Any, ...]:
        """The settings that `BUDGET` names."""
        return tuple(self.options[name] for name in BUDGET)


@dataclass(frozen=True, eq=False)
class Comparison:
    """The runs on one dataset and protocol."""

    dataset: str
    protocol: str
    index: str | None
    """SHA-256 of the dataset's index."""
    classes: tuple[str, ...]
    rows: Sequence[MethodRow]
    doubles: Sequence[str]
    """Runs that are left out, as another one has the same row, split and seed; by URI."""
    baseline: str = BASELINE
    """The method, or the label of a row, that gains are over."""

    @cached_property
    def runs(self) -> list[Run]:
        """The runs of all rows; doubles are left out."""
        return [run for row in self.rows for run in row.runs]

    @cached_property
    def splits(self) -> list[str]:
        """The splits that occur, fewest labels first."""
        return sorted({run.config.split for run in self.runs}, key=lambda name: (self.fraction(name) or 2.0, name))

    def fraction(self, split: str) -> float | None:
        """The share of the dataset's images that is labeled, 0..1; None if nothing tells.

        The name of a split is asked last: in VOC's classic protocol 1_16 is a sixteenth of the 1464 that have masks.
        """
        counts = [run.about for run in self.runs if run.config.split == split]
        shares = [a.labeled / (a.labeled + a.unlabeled) for a in counts if a.labeled and a.unlabeled is not None]
        return shares[0] if shares else 1 / FRACTIONS[split] if split in FRACTIONS else None

    def _is_baseline(self, row: MethodRow) -> bool:
        return self.baseline in (row.method, row.label)

    def pairs(self, row: MethodRow, split: str) -> list[tuple[float, float]]:
        """Last evaluations 0..1 of a row and of its baseline, over the seeds that both have finished.

        The baseline is of the same split and budget, the nearest of several. Empty if there is none, or if the row is
        of the baseline itself.
        """
        bases = [each for each in self.rows if self._is_baseline(each) and each.budget == row.budget]
        over = min((each for each in bases if each.finished(split)), key=row.distance, default=None)
        if over is None or self._is_baseline(row):
            return []
        base, own = _by_seed(over, split), _by_seed(row, split)
        return [(own[seed], base[seed]) for seed in sorted(base.keys() & own.keys())]

    def gain(self, row: MethodRow, split: str) -> Spread | None:
        """Points of mIoU over the baseline, seed by seed, as another seed is more than a small change; or None."""
        return spread([own - base for own, base in self.pairs(row, split)])

    def subject(self, split: str) -> MethodRow | None:
        """The row that is spoken of on a split: U2PL if it is finished there, else the best but the baseline."""
        others = [row for row in self.rows if row.finished(split) and not self._is_baseline(row)]
        usual = [row for row in others if row.method == SUBJECT]
        return usual[0] if usual else max(others, key=lambda row: _mean(row, split), default=None)

    def shown(self) -> list[tuple[MethodRow, Run]]:
        """Two finished runs to look at, of one split and seed if there are: the baseline and the subject.

        Empty if no run is finished.
        """
        for split in self.splits:
            base = next((row for row in self.rows if self._is_baseline(row) and row.finished(split)), None)
            if subject := self.subject(split):
                return _of_one_seed([*([base] if base else []), subject], split)
        return [(row, row.finished(split)[0]) for row in self.rows for split in self.splits if row.finished(split)][:1]

    def missing(self) -> list[tuple[MethodRow, str, list[Run], list[int]]]:
        """By row and split with gaps: the unfinished runs, and the seeds that other runs have and it lacks."""
        seeds = sorted({run.config.seed for run in self.runs})
        gaps = []
        for row in self.rows:
            for split in self.splits:
                there = {run.config.seed: run for run in row.of(split)}
                unfinished = [run for run in there.values() if not run.finished]
                absent = [seed for seed in seeds if seed not in there]
                if unfinished or absent:
                    gaps.append((row, split, unfinished, absent))
        return gaps

    def notes(self) -> list[str]:
        """What a reader has to know before comparing rows."""
        found = [self._settings(name) for name in BUDGET]
        found += [self._lists(split) for split in self.splits]
        versions = ((run.about.version, run.uri) for run in self.runs if run.about.version)
        found.append(_differing("The program's version", versions))
        pools = ((run.config.data.pool_generations, run.uri) for run in self.runs if run.config.data.pool_generations)
        found.append(_differing("How much of the unlabeled pools was there (data.pool_generations)", pools))
        if early := [f"{run.uri} at step {run.progress.step}" for run in self.runs if run.ended_early]:
            found.append(f"Ended before optim.steps, as scores rose no more (eval.patience): {_some(early)}")
        if self.doubles:
            found.append(f"Left out, as others have the same method, settings, split and seed: {_some(self.doubles)}")
        return [note for note in found if note]

    def _settings(self, name: str) -> str:
        return _differing(name, ((row.options[name], row.label) for row in self.rows))

    def _lists(self, split: str) -> str:
        runs = [run for run in self.runs if run.config.split == split and run.about.digest]
        return _differing(f"The list of split {split}", ((run.about.digest, run.uri) for run in runs))


def _of_one_seed(rows: Sequence[MethodRow], split: str) -> list[tuple[MethodRow, Run]]:
    """A finished run of each row, of a seed that all have if there is one."""
    runs = [{run.config.seed: run for run in row.finished(split)} for row in rows]
    common = sorted(set[int].intersection(*map(set, runs)))
    return [(row, found[common[0] if common else min(found)]) for row, found in zip(rows, runs, strict=True)]


def _by_seed(row: MethodRow, split: str) -> dict[int, float]:
    return {run.config.seed: run.progress.last.value for run in row.finished(split) if run.progress.last}


def _mean(row: MethodRow, split: str) -> float:
    last = row.last(split)
    return last.mean if last else 0.0


def _differing(what: str, pairs: Iterable[tuple[Any, str]]) -> str:
    """A note on what has several values, or an empty string."""
    values: dict[Any, list[str]] = {}
    for value, whose in pairs:
        values.setdefault(value, []).append(whose)
    shown = "; ".join(f"{value} ({_some(whose)})" for value, whose in values.items())
    return f"{what} differs: {shown}" if len(values) > 1 else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def compare(runs: Sequence[Run], options: Sections, baseline: str = BASELINE) -> list[Comparison]:
    """Sorts runs into comparisons: what ran on different datasets or protocols never shares a table.

    Args:
        runs: in any order.
        options: sections by method name, in the order in which tables show methods.
        baseline: see `Comparison`.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.about.index or str(run.config.data.root), run.about.protocol), []).append(run)
    return [_comparison(group, options, baseline) for group in groups.values()]


def _comparison(runs: Sequence[Run], options: Sections, baseline: str) -> Comparison:
    kept, doubles = _distinct(runs)
    about = kept[0].about
    classes = next((run.about.classes for run in kept if run.about.classes), ())
    return Comparison(about.dataset, about.protocol, about.index, classes, _rows(kept, options), doubles, baseline)


def _distinct(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """One run for each identity, the one that got furthest, and the URIs of the others."""
    best: dict[tuple[str, int, Key], Run] = {}
    for run in sorted(runs, key=lambda run: (run.finished, run.progress.step)):
        best[run.config.split, run.config.seed, key(run)] = run
    return [run for run in runs if run in best.values()], [run.uri for run in runs if run not in best.values()]


def _rows(runs: Sequence[Run], options: Sections) -> list[MethodRow]:
    """One row for each method and set of options; those that differ least from the usual come first."""
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    common = usual(runs, options)
    rows = []
    for group in groups.values():
        method, differs = group[0].config.method, differences(group[0], common)
        label = f"{method} ({', '.join(differs)})" if differs else method
        row = MethodRow(label, method, settings(group[0]), group)
        rows.append((list(options).index(method), len(differs), label, row))
    return [row for *_, row in sorted(rows, key=lambda each: each[:3])]


# ---- what tells the runs of one method apart --------------------------------------------------------------------


SHOWN_VALUE = 40
"""Characters of a value in a row's name."""
_PLACES = ("method", "split", "seed", "data.root", "data.protocol", "data.pseudo_labels", "data.pool_generations")
"""Keys that do not make a variant: the table's own axes, and paths."""
Key = tuple[str, ...]
"""Equal for the runs of one variant."""


def settings(run: Run) -> dict[str, Any]:
    """The settings that a result depends on, by dotted key."""
    return {key: value for key, value in _flat(identity(run.config)) if key not in _PLACES}


def key(run: Run) -> Key:
    """Method and settings."""
    return (run.config.method, *map(repr, settings(run).items()))


def usual(runs: Sequence[Run], options: Sections) -> dict[str, Any]:
    """The usual value of each setting: a method's default if some run has it, else the commonest."""
    found: dict[str, Counter[str]] = {}
    values: dict[str, Any] = {}
    for run in runs:
        for name, value in settings(run).items():
            values[repr(value)] = value
            found.setdefault(name, Counter())[repr(value)] += 1
    common = {name: values[counts.most_common(1)[0][0]] for name, counts in found.items()}
    defaults = dict(_flat({name: asdict(kind()) for read in options.values() for name, kind in read.items()}))
    return {
        name: defaults[name] if name in defaults and repr(defaults[name]) in found[name] else value
        for name, value in common.items()
    }


def differences(run: Run, common: Mapping[str, Any]) -> list[str]:
    """Its settings that are not the usual ones, such as `loss=binary` or `optim.steps=1800`."""
    own = f"{run.config.method}."
    return [
        f"{name.removeprefix(own)}={_shown(value)}" for name, value in settings(run).items() if value != common[name]
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}..."
