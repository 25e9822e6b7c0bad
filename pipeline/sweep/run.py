"""Runs the trials of a sweep, as many at a time as the cluster holds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.cluster import nodes
from pipeline.cluster.connect import connect
from pipeline.cluster.nodes import EPSILON, gpu_slots
from pipeline.sweep.trials import Trial
from pipeline.training.preflight import warn_of_local_places
from pipeline.training.scaling import worker_gpus, workers_of


def sized(trials: Sequence[Trial], at_once: int = 0) -> tuple[list[Trial], int]:
    """The trials with their number of workers, and how many of them run at a time on the connected cluster.

    With `scaling.workers auto` a trial gets all GPUs that are up, or one worker on a cluster of CPUs: the rest runs
    other trials. GPUs shared by `scaling.gpus_per_worker` below 1 hold as many trials as that.

    Args:
        trials: to run.
        at_once: what was asked for; 0: as many as the nodes hold that are up. More only where nodes may be started.

    Raises:
        UserError: not even one fits.
    """
    done, fit = [], []
    for trial in trials:
        config = trial.config
        if config.scaling.workers == "auto" and not worker_gpus(config, nodes.machines()):
            config = replace(config, scaling=replace(config.scaling, workers="1"))
        workers = workers_of(config)
        fewest, up = workers.counts[0], nodes.machines()
        by_cpus = int(sum(node.cpus for node in up) / (fewest * workers.cpus + workers.spare_cpus) + EPSILON)
        fit.append(min(by_cpus, gpu_slots(up, workers.gpus) // fewest) if workers.gpus else by_cpus)
        done.append(replace(trial, config=config))
    held = max(1, min(fit, default=1))
    return done, at_once if at_once and nodes.grows() else min(at_once or held, held)


def sweep(trials: Sequence[Trial], at_once: int = 0) -> dict[str, str]:
    """Runs what is not finished and shows how far it is; one trial that fails stops no other.

    Args:
        trials: of the sweep.
        at_once: how many at a time; 0: as many as the nodes hold that are up.

    Returns:
        Why each failed trial did, by name.

    Raises:
        UserError: not even one trial fits the cluster.
    """
    connect()
    from ray import tune

    # imports Ray, which must not happen before `connect`
    from pipeline.sweep.tune import LiveTable, run_tuner

    todo, at_once = sized([trial for trial in trials if not trial.finished()], at_once)
    warn_of_local_places(trials[0].config)
    named = {trial.name: trial for trial in (*trials, *todo)}

    def find(params: Mapping[str, Any], place: int) -> Trial:
        del place
        return named[params["trial"]]

    how = tune.TuneConfig(max_concurrent_trials=at_once)
    with LiveTable([*named.values()], find, len(trials)) as live:
        if todo:
            run_tuner(find, {"trial": tune.grid_search([trial.name for trial in todo])}, how, live)
    for name, why in live.failed().items():
        print(f"{name} failed: {why}")
    return live.failed()
