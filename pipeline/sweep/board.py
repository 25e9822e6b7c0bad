"""What a sweep shows while it runs: one live table on a terminal, elsewhere a line now and then."""

import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from pipeline.sweep.follow import Row, look, screen, summary
from pipeline.sweep.trials import Trial

LOOK_SECONDS = 5.0
"""How often the records of running trials are read."""
QUIET_SECONDS = 60.0
"""Time between lines where there is no terminal."""


class Board(tune.Callback):
    """Follows the trials of a sweep; Tune tells what begins and ends, the runs' own records how far they are."""

    def __init__(self, trials: Sequence[Trial], find: Callable[[Mapping[str, Any], int], Trial], total: int) -> None:
        """Begins with what is known.

        Args:
            trials: those that are known beforehand; finished ones count as done.
            find: the trial of what Tune chose, and of its place in Tune's order.
            total: how many there will be.
        """
        self._find, self._total = find, total
        self.rows = {trial.name: Row(trial) for trial in trials}
        for row in self.rows.values():
            done = row.trial.finished()
            if done and done.last:
                row.state, row.step, row.miou = "done", done.step, done.last.value
        self._drawn = 0
        self._live = sys.stdout.isatty()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="board", daemon=True)

    def __enter__(self) -> "Board":
        """Begins to show."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Shows the end."""
        self._ended.set()
        self._thread.join()
        self._show()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune saves its callbacks for a restore that is not used here."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune."""
        self._change(trial, "running")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune."""
        problem = trial.last_result.get("problem")  # said by a run that came to its end
        ended = "done" if self._found(trial).finished() else "stopped"  # a repeated search stops what is done, too
        self._change(trial, ended if problem is None else "failed" if problem else "done", problem or "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune."""
        text = Path(trial.error_file).read_text() if trial.error_file else "it ended without a word"
        self._change(trial, "failed", text.strip().splitlines()[-1])

    def failed(self) -> dict[str, str]:
        """Why each failed trial did, by name."""
        return {name: row.problem for name, row in self.rows.items() if row.state == "failed"}

    def _change(self, trial: Any, state: str, problem: str = "") -> None:
        found = self._found(trial)
        row = self.rows.setdefault(found.name, Row(found))
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
