"""Waiting out brief trouble of a storage."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import UserError

PATIENCE = 60.0
"""Seconds for which a call is repeated where nothing else is said."""

UNREACHED = ("NETWORK_CONNECTION", "Couldn't connect", "Could not connect", "Couldn't resolve")
FAILING = (
    *("SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "HTTP status 500", "HTTP status 503"),
    "NO_SUCH_UPLOAD",  # some stores say so when the end of an upload is told again, as the answer was lost
)
_BRIEF = (*UNREACHED, *FAILING)
"""Parts of the text of S3 errors that may be temporary."""

T = TypeVar("T")


class Patience:
    """How long a brief trouble of the storage is waited out, and how often something had to be asked again for it.

    One object serves a worker, or a task: it is handed to all that reads and writes for it. Threads may share it; a
    copy in another process begins to count anew.
    """

    def __init__(self, seconds: float = PATIENCE) -> None:
        """Args: seconds: for how long a call is repeated."""
        self.seconds, self.retries = seconds, 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Patience"], tuple[float]]:
        return Patience, (self.seconds,)

    def add(self, retries: int) -> None:
        """Counts what was asked again by others that worked for this one."""
        with self._lock:
            self.retries += retries

    def retried(self, call: Callable[[], T]) -> T:
        """The result of `call`, called again with growing pauses while the storage is only briefly in trouble.

        After `seconds` the last error is raised; a request that is under way then may still take as long as its
        time-outs allow, half a minute if nobody answers.

        Args:
            call: reads or writes; may be called several times.

        Raises:
            UserError: the storage stays away (if `call` translates its errors), or refuses.
        """
        began, pause = time.monotonic(), 0.25
        while True:
            try:
                return call()
            except (OSError, UserError) as error:
                if not is_brief(error):
                    raise
                waited = time.monotonic() - began
                if waited >= self.seconds:
                    if isinstance(error, UserError):
                        raise UserError(f"{error} (waited {waited:.0f} s)") from error.__cause__
                    raise
                self.add(1)
                time.sleep(min(pause, self.seconds - waited))
                pause = min(2 * pause, 8.0)


def retried(call: Callable[[], T]) -> T:
    """`Patience.retried` for what no run's patience holds for, such as preparing data."""
    return Patience().retried(call)


def is_brief(error: Exception) -> bool:
    """Whether an error may be temporary. `storage.translated` keeps the storage's own error as its cause."""
    cause = error.__cause__ or error
    return isinstance(cause, ConnectionError | TimeoutError) or any(mark in str(cause) for mark in _BRIEF)
