"""Runs the trials of a sweep on Ray Tune, each on Ray Train.

Nothing of Tune's has to be kept: a trial is a run directory, so the same command goes on where it was cut off, as
`launch` does, and passes over what is finished.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import cluster, storage
from pipeline.checkpoint import LOG_FILE
from pipeline.config import Config, as_dict
from pipeline.errors import RunError, UserError
from pipeline.sweep.trials import Trial
from pipeline.training.launch import launch
from pipeline.training.scaling import workers_of
from pipeline.typed import build


def sized(trials: Sequence[Trial]) -> tuple[list[Trial], int]:
    """The trials with their number of workers, and how many of them fit the connected cluster at a time.

    With `scaling.workers auto` a trial gets all GPUs that are up, or one worker on a cluster of CPUs: the rest runs
    other trials. GPUs shared by `scaling.gpus_per_worker` below 1 hold as many trials as that.

    Raises:
        UserError: not even one fits.
    """
    cpus, gpus = cluster.capacity()
    done, fit = [], []
    for trial in trials:
        config = trial.config
        if config.scaling.workers == "auto" and not gpus:
            config = replace(config, scaling=replace(config.scaling, workers="1"))
        workers = workers_of(config)
        fewest = workers.counts[0]
        by_cpus = cpus // (fewest * workers.cpus + workers.spare_cpus)
        fit.append(int(gpus // (fewest * workers.gpus) if workers.gpus else by_cpus))
        done.append(replace(trial, config=config))
    return done, max(1, min(fit))


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
    from pipeline.sweep.board import Board  # imports Ray, which must not happen before `connect`

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
