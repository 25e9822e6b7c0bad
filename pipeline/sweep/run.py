"""Runs the trials of a sweep, as many at a time as the cluster holds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline import cluster
from pipeline.sweep.trials import Trial
from pipeline.training.scaling import EPSILON, gpu_slots, worker_gpus, workers_of


def sized(trials: Sequence[Trial]) -> tuple[list[Trial], int]:
    """The trials with their number of workers, and how many of them fit the connected cluster at a time.

    With `scaling.workers auto` a trial gets all GPUs that are up, or one worker on a cluster of CPUs: the rest runs
    other trials. GPUs shared by `scaling.gpus_per_worker` below 1 hold as many trials as that.

    Raises:
        UserError: not even one fits.
    """
    possible, done, fit = cluster.possible_machines(), [], []
    cpus = sum(machine.cpus for machine in possible)
    for trial in trials:
        config = trial.config
        if config.scaling.workers == "auto" and not worker_gpus(config, possible):
            config = replace(config, scaling=replace(config.scaling, workers="1"))
        workers = workers_of(config)
        fewest = workers.counts[0]
        by_cpus = int(cpus / (fewest * workers.cpus + workers.spare_cpus) + EPSILON)
        fit.append(min(by_cpus, gpu_slots(possible, workers.gpus) // fewest) if workers.gpus else by_cpus)
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
    from ray import tune

    # these import Ray, which must not happen before `connect`
    from pipeline.sweep.board import Board
    from pipeline.sweep.tuner import run_tuner

    trials, fit = sized(trials)
    named = {trial.name: trial for trial in trials}

    def find(params: Mapping[str, Any], place: int) -> Trial:
        del place
        return named[params["trial"]]

    todo = [trial.name for trial in trials if not trial.finished()]
    how, failed = tune.TuneConfig(max_concurrent_trials=min(at_once or fit, fit)), {}
    with Board(trials, find, len(trials)) as board:
        if todo:
            failed = run_tuner(find, {"trial": tune.grid_search(todo)}, how, board)
    for name, why in failed.items():
        print(f"{name} failed: {why}")
    return len(failed)
