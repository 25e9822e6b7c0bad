"""Trials on Ray Tune, each on Ray Train, and what is shown of them meanwhile; imports Ray.

Nothing of Tune's has to be kept: a trial is a run directory, so the same command goes on where it was cut off, as
`launch` does, and passes over what is finished.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray.util
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline import storage
from pipeline.checkpoint import LOG_FILE, Progress
from pipeline.config import cli
from pipeline.config.methods import OPTIONS
from pipeline.config.schema import as_dict
from pipeline.errors import RunError, UserError
from pipeline.patience import retried
from pipeline.sweep.table import TrialRow, evaluations, look, screen, summary
from pipeline.sweep.trials import Trial
from pipeline.training.launch import launch
from pipeline.training.lease import SILENCE_SECONDS
from pipeline.training.recipe import self_train

Find = Callable[[Mapping[str, Any], int], Trial]
"""Makes the trial of the values that Tune chose; the number counts Tune's trials."""
LOOK_SECONDS = 5.0
"""How often the records of running trials are read."""
LOG_SECONDS = 10.0
"""Time between two copies of a trial's log into its run directory."""
QUIET_SECONDS = 60.0
"""Time between lines where there is no terminal."""
END_SECONDS = 30.0
"""After a signal the driver ends by itself, or after so long in any case: trials go with it, and resume."""


# ---- what is shown ----------------------------------------------------------------------------------------------


class LiveTable(tune.Callback):
    """Follows the trials of a sweep; Tune tells what begins and ends, the runs' own records how far they are."""

    def __init__(self, trials: Sequence[Trial], find: Find, total: int) -> None:
        """Begins with what is known.

        Args:
            trials: those that are known beforehand; finished ones count as done.
            find: the trial of what Tune chose, and of its place in Tune's order.
            total: how many there will be.
        """
        self._find, self._total = find, total
        self.rows = {trial.name: TrialRow(trial) for trial in trials}
        for row in self.rows.values():
            done = row.trial.finished()
            if done and done.last:
                row.state, row.step, row.miou = "done", done.step, done.last.value
        self._drawn = 0
        self._live = sys.stdout.isatty()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="live", daemon=True)
        self._handlers: dict[int, Any] = {}
        self._signal = 0
        self._end = threading.Timer(END_SECONDS, lambda: os._exit(128 + self._signal))
        self._end.daemon = True

    def __enter__(self) -> "LiveTable":
        """Starts the thread that shows the table, and listens for what is to end the sweep; in the main thread."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                self._handlers[number] = signal.signal(number, self._heard)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops it and shows the final table."""
        if not isinstance(error[1], KeyboardInterrupt):
            self._end.cancel()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._ended.set()
        self._thread.join()
        self._show()

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune pickles its callbacks for a restore that is not used here."""
        return {}

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if not self._signal:
            self._end.start()
        self._signal = number
        self._handlers[number](number, frame)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raises again what a signal's handler raised where it was lost; called by Tune in each turn of its loop.

        Python drops what is raised in a destructor or a callback from C, and Ray runs both as it starts a trial.
        """
        if self._signal:
            self._handlers[self._signal](self._signal, None)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Notes that a trial runs; called by Tune."""
        self._change(trial, "running")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Notes that a trial has ended: done, stopped by a scheduler, or failed; called by Tune."""
        problem = trial.last_result.get("problem")  # said by a run that came to its end
        ended = "done" if self._found(trial).finished() else "stopped"  # a repeated search stops what is done, too
        self._change(trial, ended if problem is None else "failed" if problem else "done", problem or "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Notes that a trial has failed, with the last line of its error; called by Tune."""
        text = Path(trial.error_file).read_text() if trial.error_file else "it ended without a word"
        self._change(trial, "failed", text.strip().splitlines()[-1])

    def failed(self) -> dict[str, str]:
        """The reason of each failed trial, by its name."""
        return {name: row.problem for name, row in self.rows.items() if row.state == "failed"}

    def _change(self, trial: Any, state: str, problem: str = "") -> None:
        found = self._found(trial)
        row = self.rows.setdefault(found.name, TrialRow(found))
        row.state, row.problem = state, problem
        look(row)
        if not self._live:
            print("  ".join(row.cells()), flush=True)

    def _found(self, trial: Any) -> Trial:
        return self._find(trial.config, int(trial.custom_trial_name))

    def _follow(self) -> None:
        quiet = 0.0
        while not self._ended.wait(LOOK_SECONDS):
            for row in [*self.rows.values()]:
                if row.state == "running":
                    look(row)
            quiet += LOOK_SECONDS
            if self._live or quiet >= QUIET_SECONDS:
                self._show()
                quiet = 0.0

    def _show(self) -> None:
        rows = [*self.rows.values()]  # a search adds some meanwhile
        if self._live:
            lines = screen(rows, self._total, *shutil.get_terminal_size())
            print(f"\x1b[{self._drawn}F\x1b[J" * bool(self._drawn) + "\n".join(lines), flush=True)
            self._drawn = len(lines)
            return
        running = ", ".join(" ".join(row.cells()[::2]) for row in rows if row.state == "running")
        print(summary(rows, self._total) + f"; {running}" * bool(running), flush=True)


# ---- what is run ------------------------------------------------------------------------------------------------


def run_tuner(find: Find, space: dict[str, Any], how: tune.TuneConfig, live: LiveTable) -> None:
    """Runs what Tune chooses; one trial that fails stops no other.

    Args:
        find: the trial of a choice.
        space: what Tune chooses from.
        how: how it chooses, and how many run at a time.
        live: is told what happens, and shows it.
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
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[live]),
        ).fit()


class ScoreReporter(TuneReportCallback):
    """Tells Tune of the evaluations of a run, not of its other checkpoints."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Tells Tune of a report if it holds a score; called by Ray Train's controller."""
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
            # of a sweep that was killed a moment ago, trials may not know yet
            progress = run(cli.resolve(values, OPTIONS), callbacks=[ScoreReporter()], grace=SILENCE_SECONDS)
            step, score = progress.step, progress.last.value if progress.last else score
        except (UserError, RunError) as error:
            problem = " ".join(str(error).split())
            print(problem)
    return {"problem": problem, "step": step, "score": score}


@contextlib.contextmanager
def _logged(out: str) -> Iterator[None]:
    """Appends what is printed inside to the log of the run in `out`, every few seconds: it can be read meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        path, ended = Path(folder) / LOG_FILE, threading.Event()
        with path.open("w", buffering=1) as log, contextlib.redirect_stdout(log):
            thread = threading.Thread(target=_copy, args=(path, storage.join(out, LOG_FILE), ended), name="log")
            thread.start()
            try:
                yield
            finally:
                log.flush()
                ended.set()
                thread.join()


def _copy(path: Path, uri: str, ended: threading.Event) -> None:
    """Keeps a log in the storage that is being written on this disk, behind what was there before."""
    with contextlib.suppress(UserError, OSError):  # a log that cannot be written costs no result
        before = retried(lambda: storage.read_bytes(uri) if storage.exists(uri) else b"")
        copied = b""
        while True:
            last = ended.wait(LOG_SECONDS)
            text = path.read_bytes()
            if text != copied:
                retried(partial(storage.write_bytes, uri, before + text))
                copied = text
            if last:
                return
