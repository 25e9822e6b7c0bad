"""One console for a run on many machines: the driver prints the workers' log lines and none of Ray's own."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import UserCallback
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import UserError


@contextmanager
def relayed() -> Iterator[Queue]:
    """A queue whose messages the driver prints until the block ends."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})  # elsewhere it would die with its node
    ended = threading.Event()
    thread = threading.Thread(target=_print, args=(queue, ended), name="console", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        ended.set()
        thread.join(10)
        queue.shutdown()


def _print(queue: Queue, ended: threading.Event) -> None:
    while True:
        stopping = ended.is_set()  # looked at before the queue is emptied, so that nothing is left behind
        try:
            print(queue.get(timeout=0.5), flush=True)
        except Empty:
            if stopping:
                return


def send_logs(queue: Queue, level: int) -> None:
    """Sends this process's log records of `level` and above to the driver."""
    root = logging.getLogger("pipeline")
    root.handlers = [_QueueHandler(queue)]
    root.setLevel(level)
    root.propagate = False


class _QueueHandler(logging.Handler):
    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self._queue = queue

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        self._queue.put(level + record.getMessage())


class LostWorkers(UserCallback):
    """Logs each lost worker with the last line of its error, and ends a run that new workers cannot save."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller, which ends the run if this raises.

        Raises:
            UserError: that is what ended a worker; others in its place would only meet it again.
        """
        del run_context
        for error in worker_exceptions.values():
            cause = getattr(error, "cause", error)
            if isinstance(cause, UserError):
                raise UserError(str(cause))
        for rank, error in sorted(worker_exceptions.items()):
            line = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            self._queue.put(f"worker {rank} was lost: {line.strip()[:200]}")
