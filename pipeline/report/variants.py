"""What tells the runs of one method apart: settings by dotted key, the usual ones, and the names of the others."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.config import identity
from pipeline.report.runs import Run, sections

SHOWN_VALUE = 40
"""Characters of a value in a row's name."""

_PLACES = ("method", "split", "seed", "data.root", "data.protocol", "data.pseudo_labels", "data.pool_generations")
"""Keys that tell no variants apart: what the table is over, and where things lie."""

Key = tuple[str, ...]
"""Equal for the runs of one variant."""


def settings(run: Run) -> dict[str, Any]:
    """What makes the result what it is, by dotted key; options of other methods do not count."""
    values = identity(run.config)
    methods = values.pop("methods")
    own = {name: methods[name] for name in sections(run.config.method, methods)}
    return {
        key: value
        for key, value in _flat({**values, **{f"methods.{k}": v for k, v in own.items()}})
        if key not in _PLACES
    }


def key(run: Run) -> Key:
    """Method and settings."""
    return (run.config.method, *map(repr, settings(run).items()))


def usual(runs: Sequence[Run], options: Mapping[str, type]) -> dict[str, Any]:
    """The value of each setting that goes without saying: a method's default if a run has it, else the commonest."""
    found: dict[str, Counter[str]] = {}
    values: dict[str, Any] = {}
    for run in runs:
        for name, value in settings(run).items():
            values[repr(value)] = value
            found.setdefault(name, Counter())[repr(value)] += 1
    common = {name: values[counts.most_common(1)[0][0]] for name, counts in found.items()}
    defaults = dict(_flat({f"methods.{method}": asdict(kind()) for method, kind in options.items()}))
    return {
        name: defaults[name] if repr(defaults.get(name)) in found[name] else value for name, value in common.items()
    }


def differences(run: Run, common: Mapping[str, Any]) -> list[str]:
    """Its settings that are not the usual ones, such as `loss=binary` or `optim.steps=1800`."""
    own = f"methods.{run.config.method}."
    return [
        f"{name.removeprefix(own).removeprefix('methods.')}={_shown(value)}"
        for name, value in settings(run).items()
        if value != common[name]
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
