"""One console for a run on many machines: the driver prints the workers' log lines, and tells the workers to stop."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.failures import explained
from pipeline.cluster.line import Line, Said
from pipeline.cluster.terminal import Bar, say
from pipeline.errors import Stopped, UserError

POLL_SECONDS = 0.5
"""For which the driver listens for lines before it looks around."""
ANSWER_SECONDS = 2.0
"""After which an actor that has not answered has not started yet."""


class Console:
    """The driver's end: prints what is said, and passes on the first SIGTERM or Ctrl-C. A second one ends at once."""

    def __init__(self, steps: int) -> None:
        """Args: steps: of the whole run."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(num_cpus=0)(Line)
        self.line = actor.options(scheduling_strategy=here).remote()  # elsewhere it would die with its node
        """Handle for workers and the controller: `send_logs`, `LostWorkers`, `StopAsked`."""
        self.signal: signal.Signals | None = None
        """The first signal that has come."""
        self._bar = Bar(steps)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="console", daemon=True)

    def stopped(self, step: int | None = None) -> Stopped:
        """The end of the run by the signal that has come.

        Args:
            step: of the checkpoint that was still written; None: it was not.
        """
        number = self.signal or signal.SIGINT
        at, place = (f" after step {step}", "there") if step is not None else ("", "the newest checkpoint")
        return Stopped(f"stopped by {number.name}{at}; the same command goes on from {place}", number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is not None:
            raise self.stopped()
        self.signal = signal.Signals(number)

    def _follow(self) -> None:
        told, answer = False, self.line.heard.remote()
        while True:
            ending = self._ended.is_set()  # looked at before the lines are taken, so that none is left behind
            try:
                if ray.wait([answer], timeout=POLL_SECONDS)[0]:
                    heard, answer = ray.get(answer), self.line.heard.remote()
                    for said in heard:
                        self._show(said)
                elif ending:
                    return
                if self.signal is not None and not told:
                    told = True
                    self._tell(self.signal)
            except RayError:  # the cluster is gone; the run ends with what Ray Train says of it
                return

    def _show(self, said: Said) -> None:
        if said.step is None:
            say(said.line)
        else:
            self._bar.show(said.step, said.line, said.brief)

    def _tell(self, number: signal.Signals) -> None:
        asked = self.line.stop.remote()
        if ray.wait([asked], timeout=ANSWER_SECONDS)[0] and ray.get(asked):
            say(f"{number.name}: a checkpoint at the next step, then the end; once more ends at once")
        else:  # nothing is trained that could be lost
            os.kill(os.getpid(), number)


@contextmanager
def relayed(steps: int) -> Iterator[Console]:
    """A console that is open until the block ends, of a run of so many steps."""
    console = Console(steps)
    main = threading.current_thread() is threading.main_thread()  # in an actor of Tune it is not: no signals there
    numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
    before = {number: signal.signal(number, console._on_signal) for number in numbers}
    console._thread.start()
    try:
        yield console
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        console._ended.set()
        console._thread.join(10)
        console._bar.close()
        with suppress(RayError):
            ray.kill(console.line)


# ---- the workers' end -------------------------------------------------------------------------------------------


class StopAsked:
    """Whether the driver has asked to stop; costs no more than a look."""

    def __init__(self, line: Any) -> None:
        """Args: line: `Console.line`."""
        self._answer = line.stopping.remote()

    def __bool__(self) -> bool:
        return bool(ray.wait([self._answer], timeout=0)[0])


def send_logs(line: Any, level: int) -> None:
    """Sends this process's log records of `level` and above to the driver.

    One about how far the run is has the attributes `step` and `brief` of `Said`.
    """
    root = logging.getLogger("pipeline")
    root.handlers = [_LineHandler(line)]
    root.setLevel(level)
    root.propagate = False


class _LineHandler(logging.Handler):
    def __init__(self, line: Any) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        step, brief = getattr(record, "step", None), getattr(record, "brief", "")
        ray.get(self._line.say.remote(Said(level + record.getMessage(), step, brief)))


class LostWorkers(UserCallback):
    """Logs each lost worker with the last line of its error, and ends a run that new workers cannot save."""

    def __init__(self, line: Any) -> None:
        """Args: line: `Console.line`."""
        self._line = line

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller, which ends the run if this raises.

        Raises:
            UserError: that is what ended a worker, and others in its place would only meet it again; or the run is to
                stop anyway.
        """
        del run_context
        for error in worker_exceptions.values():
            cause = getattr(error, "cause", error)
            if isinstance(cause, UserError):
                raise UserError(str(cause))
        for rank, error in sorted(worker_exceptions.items()):
            ray.get(self._line.say.remote(Said(f"worker {rank} was lost: {explained(error)}")))
        if ray.get(self._line.is_stopping.remote()):
            raise UserError("stopped")
