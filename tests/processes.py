"""Finding and ending the processes that a test itself has started."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T], seconds: float = 120.0) -> T:
    """Polls until `look` gives something true.

    Raises:
        TimeoutError: it does not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.1)
    raise TimeoutError(f"waited {seconds:.0f} s for {what}")


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended meanwhile
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found, queue = [], [pid]
    while queue:
        queue.extend(children.get(queue.pop(), []))
        found = [*found, *[each for each in queue if each not in found]]
    return found


def named(pid: int, text: str) -> list[int]:
    """The processes below `pid` whose command line holds `text`."""
    matches = []
    for each in descendants(pid):
        try:
            if text in (Path("/proc") / str(each) / "cmdline").read_text():
                matches.append(each)
        except OSError:
            continue
    return matches


@contextmanager
def held(pid: int) -> Iterator[None]:
    """Stops a process until the end of the block, if it lives so long."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def kill(*pids: int) -> None:
    """SIGKILL, as a lost machine would look."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
