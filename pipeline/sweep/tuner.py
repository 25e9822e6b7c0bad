"""Runs trials on Ray Tune, each on Ray Train; imports Ray.

Nothing of Tune's has to be kept: a trial is a run directory, so the same command goes on where it was cut off, as
`launch` does, and passes over what is finished.
"""

import contextlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.util
from ray import tune
from ray.train import TrainingFailedError
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline import storage
from pipeline.checkpoint import LOG_FILE, Progress
from pipeline.config import Config, as_dict
from pipeline.errors import RunError, UserError
from pipeline.sweep.board import Board
from pipeline.sweep.follow import evaluations
from pipeline.sweep.trials import Trial
from pipeline.training.launch import launch
from pipeline.training.self_training import self_train
from pipeline.typed import build

Find = Callable[[Mapping[str, Any], int], Trial]
"""The trial of what Tune chose, and of its place in the order in which Tune did."""


def run_tuner(find: Find, space: dict[str, Any], how: tune.TuneConfig, board: Board) -> None:
    """Runs what Tune chooses; one trial that fails stops no other.

    Args:
        find: the trial of a choice.
        space: what Tune chooses from.
        how: how it chooses, and how many run at a time.
        board: is told what happens, and shows it.
    """

    def train(params: dict[str, Any]) -> dict[str, Any]:
        trial = find(params, int(tune.get_context().get_trial_name()))
        if trial.problem:
            return {"problem": trial.problem, "step": 0, "score": -1.0}
        return _train(as_dict(trial.config), self_train if trial.staged else launch, trial.out)

    places: dict[str, int] = {}

    def name(trial: Any) -> str:
        return f"{places.setdefault(trial.trial_id, len(places)):03d}"

    how.trial_name_creator = how.trial_dirname_creator = name
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:  # of no use once the sweep has ended
        tune.Tuner(
            # on the driver's node, as it only waits for its workers: they may be lost with their nodes, it should not
            tune.with_resources(train, {f"node:{ray.util.get_node_ip_address()}": 0.001}),
            param_space=space,
            tune_config=how,
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[board]),
        ).fit()


class Scores(TuneReportCallback):
    """Tells Tune of the evaluations of a run, not of its other checkpoints."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train's controller."""
        if metrics[0]["score"] >= 0:
            super().after_report(run_context, metrics, checkpoint)


def _train(values: dict[str, Any], run: Callable[..., Progress], out: str) -> dict[str, Any]:
    """Runs in an actor of Tune: a whole run, with what it says in its own log.

    What an earlier attempt has evaluated is told again, so that a scheduler decides as it did then, at least if one
    trial runs at a time: ASHA's verdict depends on who came first.
    """
    problem, step, score = "", 0, -1.0
    with _logged(out):
        for step, score in evaluations(out):
            tune.report({"step": step, "score": score})
        try:
            progress = run(build(Config, values), callbacks=[Scores()])
            step, score = progress.step, progress.last.value if progress.last else score
        except (UserError, RunError) as error:
            problem = " ".join(str(error).split())
            print(problem)
        except TrainingFailedError as error:  # workers that were lost too often, or a fault of the program
            problem = str(error).strip().splitlines()[-1]
            traceback.print_exc(file=sys.stdout)
    return {"problem": problem, "step": step, "score": score}


@contextlib.contextmanager
def _logged(out: str) -> Iterator[None]:
    """Appends what is printed inside to the log of the run in `out`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / LOG_FILE
        try:
            with path.open("w") as log, contextlib.redirect_stdout(log):
                yield
        finally:
            with contextlib.suppress(UserError, OSError):  # a log that cannot be written costs no result
                storage.retried(lambda: _append(storage.join(out, LOG_FILE), path.read_bytes()))


def _append(uri: str, text: bytes) -> None:
    storage.write_bytes(uri, (storage.read_bytes(uri) if storage.exists(uri) else b"") + text)
