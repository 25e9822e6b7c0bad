"""The trials of a sweep: method x split x seed (x any option), each an ordinary run directory below `SWEEP/trials`."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline import checkpoint, storage
from pipeline.checkpoint import CONFIG_FILE, STUDENT, SUMMARY_FILE, Progress, read_summary
from pipeline.config import cli
from pipeline.config.methods import OPTIONS, SPECS
from pipeline.config.schema import Config, merge
from pipeline.errors import UserError
from pipeline.training.preflight import check_identity, resolve, resolve_paths
from pipeline.training.recipe import check_recipe

TRIALS = "trials"
"""Folder of the run directories below a sweep."""
DEFAULT_OUT = "runs/sweep"
"""Directory of a sweep without `--out`."""
GRIDS = {
    "ablation_reliability": ("u2pl.negative_pixels", ("unreliable", "reliable", "all")),
    "ablation_loss": ("u2pl.loss", ("contrastive", "binary")),
}
"""Named grids: tables 4 and A2 of the U2PL paper, and its comparison of the two losses."""
OptionGrid = Mapping[str, Sequence[str]]
"""Values to try by dotted key, such as `optim.lr`."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    """METHOD-SPLIT-sSEED, and what the grid sets; the name of its directory."""
    config: Config
    """Checked, with absolute paths; `out` is the run directory."""
    problem: str = ""
    """Why it cannot be run, if a search has drawn values that do not fit together."""

    @property
    def staged(self) -> bool:
        """Whether it makes its pseudo-labels itself: a recipe of several runs."""
        return SPECS[self.config.method].views.pseudo and self.config.data.pseudo_labels is None

    @property
    def out(self) -> str:
        """The run directory with its result."""
        return storage.join(str(self.config.out), STUDENT) if self.staged else str(self.config.out)

    def finished(self) -> Progress | None:
        """Its result, once there is one."""
        uri = storage.join(self.out, SUMMARY_FILE)
        return read_summary(uri) if storage.exists(uri) else None

    def begun(self) -> bool:
        """Whether its run directory is there."""
        return storage.exists(storage.join(self.out, CONFIG_FILE))

    def steps(self) -> int:
        """Steps up to its newest checkpoint."""
        newest = checkpoint.newest(self.out)
        return checkpoint.read_meta(newest).step if newest else 0


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Reads `section.key=a,b,c` and names out of `GRIDS`.

    Raises:
        UserError: neither, or a key twice.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals and key not in GRIDS:
            raise UserError(f"--grid {text}: neither section.key=a,b,c nor one of {', '.join(GRIDS)}")
        key, found = GRIDS[key] if not equals else (key, tuple(filter(None, values.split(","))))
        if key in grid or not key or not found:
            raise UserError(f"--grid {text}: {key} is there twice, or has no values")
        grid[key] = found
    return grid


def make_trials(
    base: Mapping[str, Any], methods: Sequence[str], splits: Sequence[str], seeds: int, grid: OptionGrid
) -> list[Trial]:
    """All trials of a sweep, checked as far as can be without starting one.

    A key in a method's section varies the methods that read it: `u2pl.alpha_0` those of `u2pl` and `u2pl_ael`.

    Args:
        base: plain values by section that all have in common; `out` is the sweep's directory.
        methods: names out of `SPECS`.
        splits: names of splits.
        seeds: how many, counted up from that of `base`.
        grid: further options.

    Raises:
        UserError: no method or split, an unknown one or one twice, an unknown key or value, a key that no method
            reads, or what `preflight.resolve` raises.
    """
    if not methods or not splits:
        raise UserError("--methods, --splits: name at least one each")
    for name, values in (("--methods", methods), ("--splits", splits), *((f"--grid {key}", grid[key]) for key in grid)):
        if len(set(values)) < len(values):
            raise UserError(f"{name}: {','.join(values)} names one twice")
    common, sections = cli.resolve(base, OPTIONS), {key: key.partition(".")[0] for key in grid}
    trials, read = [], set[str]()
    for method, split, seed in itertools.product(methods, splits, range(seeds)):
        if method not in SPECS:
            raise UserError(f"unknown method {method!r}; choose from {', '.join(SPECS)}")
        place = {"method": method, "split": split, "seed": common.seed + seed, "out": common.out or DEFAULT_OUT}
        values = {**base, **place}
        keys = [key for key, name in sections.items() if name in OPTIONS[method] or name not in OPTIONS]
        read.update(keys)
        for drawn in itertools.product(*(grid[key] for key in keys)):
            chosen = dict(zip(keys, drawn, strict=True))
            name = "-".join([method, split, f"s{values['seed']}", *(f"{key}-{value}" for key, value in chosen.items())])
            trials.append(make_trial(values, name, chosen))
    for key in grid:
        if key not in read:
            raise UserError(f"--grid {key}: none of the methods {', '.join(methods)} reads it")
    return _pinned(trials)


def _pinned(trials: Sequence[Trial]) -> list[Trial]:
    """The trials, checked; all see the same of what grows: what one that has begun sees, else what is there now.

    Growing are the generations of pools, and the checkpoints of a run that is still trained and that they begin with.
    """
    known: dict[tuple[str, ...], tuple[int, ...]] = {}
    starts: dict[str, str] = {}
    done = {}
    for trial, begun in sorted(((trial, trial.begun()) for trial in trials), key=lambda each: not each[1]):
        data, reads = trial.config.data, SPECS[trial.config.method].views.unlabeled
        model, weights = trial.config.model, trial.config.model.weights
        if reads and data.unlabeled_pools in known and not begun:
            data = replace(data, pool_generations=known[data.unlabeled_pools])
        if weights in starts and not begun:
            model = replace(model, weights=starts[weights])
        checked = check_trial(replace(trial, config=replace(trial.config, data=data, model=model)))
        if not trial.staged:
            starts.setdefault(weights, checked.config.model.weights)
        if reads:
            known.setdefault(data.unlabeled_pools, checked.config.data.pool_generations)
        done[trial.name] = checked
    return [done[trial.name] for trial in trials]


def check_trial(trial: Trial) -> Trial:
    """The trial with the generations of its pools that count, if it can be run and its directory is its own.

    Raises:
        UserError: what `preflight.resolve` raises.
    """
    if trial.staged:
        check_recipe(trial.config)
        return trial
    config = resolve(trial.config).config
    check_identity(config)
    return replace(trial, config=config)


def make_trial(values: Mapping[str, Any], name: str, chosen: Mapping[str, str]) -> Trial:
    """One trial below the directory `out` of `values`, with chosen values by dotted key, its places absolute.

    Raises:
        UserError: an unknown key or value.
    """
    values = {**values, "out": storage.join(str(values["out"]), TRIALS, name)}
    for key, value in chosen.items():
        section, dot, field = key.partition(".")
        values = merge(values, {section: {field: value}} if dot else {section: value})
    return Trial(name, resolve_paths(cli.resolve(values, OPTIONS)))
