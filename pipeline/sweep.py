"""Partition-protocol sweeps: method x split x seed (x any option) as trials of Ray Tune, each a run of Ray Train.

A trial is an ordinary run directory below `SWEEP/trials`. So nothing of Tune's has to be kept: the same command goes on
where it was cut off, as `launch` does, and passes over what is finished.
"""

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import checkpoint, cli, cluster, storage
from pipeline.checkpoint import CONFIG_FILE, LOG_FILE, SUMMARY_FILE, Progress
from pipeline.config import Config, as_dict, build, merge
from pipeline.errors import RunError, UserError
from pipeline.methods import METHODS, OPTIONS
from pipeline.training.launch import (
    CPUS_PER_WORKER,
    check,
    check_same,
    launch,
    placed,
    spare_cpus,
    worker_count,
)

TRIALS = "trials"
"""Folder of the run directories below a sweep."""
DEFAULT_OUT = "runs/sweep"

GRIDS = {
    "ablation_reliability": ("u2pl.negative_pixels", ("unreliable", "reliable", "all")),
    "ablation_loss": ("u2pl.loss", ("contrastive", "binary")),
}
"""Named grids: tables 4 and A2 of the U2PL paper, and its comparison of the two losses."""

Grid = Mapping[str, Sequence[str]]
"""Values to try by dotted key, such as `optim.lr`."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    """METHOD-SPLIT-sSEED, and what the grid sets; the name of its directory."""
    config: Config
    """Placed and checked; `out` is its run directory."""

    @property
    def out(self) -> str:
        """Its run directory."""
        return str(self.config.out)

    def finished(self) -> Progress | None:
        """Its result, once there is one."""
        uri = storage.join(self.out, SUMMARY_FILE)
        return Progress.from_dict(json.loads(storage.read_bytes(uri))) if storage.exists(uri) else None

    def begun(self) -> bool:
        """Whether its run directory is there."""
        return storage.exists(storage.join(self.out, CONFIG_FILE))

    def steps(self) -> int:
        """Steps up to its newest checkpoint."""
        newest = checkpoint.newest(self.out)
        return checkpoint.read_meta(newest)["step"] if newest else 0


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


def make_trials(base: Config, methods: Sequence[str], splits: Sequence[str], seeds: int, grid: Grid) -> list[Trial]:
    """All trials of a sweep, checked as far as can be without starting one.

    A key in a method's section varies the methods that read it: those with its name in theirs (`u2pl` in `u2pl_ael`).

    Args:
        base: what all have in common; its `out` is the sweep's directory.
        methods: names out of `METHODS`.
        splits: names of splits.
        seeds: how many, counted up from that of `base`.
        grid: further options.

    Raises:
        UserError: no method or split, an unknown one, an unknown key or value, or what `launch.check` raises.
    """
    if not methods or not splits:
        raise UserError("--methods, --splits: name at least one each")
    base = placed(replace(base, out=base.out or DEFAULT_OUT))
    trials = []
    for method, split, seed in itertools.product(methods, splits, range(seeds)):
        if method not in METHODS:
            raise UserError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
        config = replace(base, method=method, split=split, seed=base.seed + seed)
        keys = [key for key in grid if key.partition(".")[0] not in OPTIONS or key.partition(".")[0] in method]
        for values in itertools.product(*(grid[key] for key in keys)):
            chosen = dict(zip(keys, values, strict=True))
            name = "-".join([method, split, f"s{config.seed}", *(f"{key}-{value}" for key, value in chosen.items())])
            trials.append(Trial(name, _varied(config, chosen, storage.join(str(base.out), TRIALS, name))))
    for trial in trials:
        check_same(check(trial.config).config)
    return trials


def _varied(config: Config, chosen: Mapping[str, str], out: str) -> Config:
    values = as_dict(replace(config, out=out))
    for key, value in chosen.items():
        section, dot, field = key.partition(".")
        values = merge(values, {section: {field: value}} if dot else {section: value})
    return cli.resolve(values, OPTIONS)


def sized(trials: Sequence[Trial]) -> tuple[list[Trial], int]:
    """The trials with their number of workers, and how many of them fit the connected cluster at a time.

    Without `run.workers` a trial gets all GPUs, or one worker on a cluster of CPUs: the rest runs other trials.

    Raises:
        UserError: not even one fits.
    """
    cpus, gpus = cluster.cpus_and_gpus()
    done, fit = [], []
    for trial in trials:
        run = trial.config.run
        workers = worker_count(trial.config) if run.workers or gpus else 1
        needed = workers * (run.cpus_per_worker or CPUS_PER_WORKER) + spare_cpus(trial.config)
        fit.append(int(gpus // workers) if gpus else int(cpus // needed))
        done.append(replace(trial, config=replace(trial.config, run=replace(run, workers=workers))))
    if min(fit) < 1:
        raise UserError(f"{trials[fit.index(0)].name} does not fit {cpus:g} CPUs and {gpus:g} GPUs: lower run.workers")
    return done, min(fit)


def sweep(trials: Sequence[Trial], at_once: int = 0) -> int:
    """Runs what is not finished and shows how far it is; one trial that fails stops no other.

    Args:
        trials: of the sweep.
        at_once: how many at a time; 0: as many as the cluster holds.

    Returns:
        How many failed.

    Raises:
        UserError: not even one trial fits the cluster.
    """
    cluster.connect()
    from pipeline.board import Board  # imports Ray, which must not happen before `connect`

    trials, fit = sized(trials)
    todo = [trial for trial in trials if not trial.finished()]
    failed = {}
    with Board(trials) as board:
        if todo:
            failed = run_trials(todo, min(at_once or fit, fit), board)
    for name, why in failed.items():
        print(f"{name} failed: {why}")
    return len(failed)


def run_trials(trials: Sequence[Trial], at_once: int, watch: Any) -> dict[str, str]:
    """Runs trials on Ray Tune; one that fails stops no other.

    Args:
        trials: that are not finished.
        at_once: how many at a time.
        watch: a `tune.Callback` that shows what happens.

    Returns:
        Why each failed trial did, by name.
    """
    from ray import tune

    configs = {trial.name: as_dict(trial.config) for trial in trials}

    def train(params: dict[str, str]) -> dict[str, Any]:
        return _train(configs[params["trial"]])

    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:  # of no use once the sweep has ended
        results = tune.Tuner(
            tune.with_resources(train, {"CPU": 0.01}),  # it waits for its workers
            param_space={"trial": tune.grid_search([*configs])},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=at_once, trial_dirname_creator=lambda trial: trial.trial_id
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[watch]),
        ).fit()
    failed = {}
    for result in results:
        if result.error is not None and result.config is not None:
            failed[result.config["trial"]] = str(result.error).strip().splitlines()[-1]
        elif result.metrics is not None and result.metrics["problem"]:
            failed[result.metrics["config"]["trial"]] = result.metrics["problem"]
    return failed


def _train(values: dict[str, Any]) -> dict[str, Any]:
    """Runs in an actor of Tune: a whole run, with what it says in its own log."""
    config: Config = build(Config, values)
    problem, score = "", -1.0
    with _logged(config):
        try:
            progress = launch(config)
            score = progress.last.value if progress.last else score
        except (UserError, RunError) as error:
            problem = " ".join(str(error).split())
            print(problem)
    return {"problem": problem, "score": score}


@contextlib.contextmanager
def _logged(config: Config) -> Iterator[None]:
    """Appends what is printed inside to the log of a run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / LOG_FILE
        try:
            with path.open("w") as log, contextlib.redirect_stdout(log):
                yield
        finally:
            uri = storage.join(str(config.out), LOG_FILE)
            before = storage.read_bytes(uri) if storage.exists(uri) else b""
            storage.write_bytes(uri, before + path.read_bytes())
