"""One writer: which job trains a run, and which attempt of its workers may write.

A job holds the lease of its run directory from before it touches anything there until it ends, and shows every few
seconds that it is alive. A second job ends with one line while the first one lives. One that has died is known by its
process on the same machine, else by its silence, which the second job times itself: clocks are not compared.

The workers of a job may be started anew while a machine that was cut off still computes. So each attempt has a name,
a fencing token that is looked at before each write.
"""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from json import dumps, loads
from pathlib import Path

from pipeline import storage, versions
from pipeline.errors import UserError
from pipeline.patience import Patience
from pipeline.records import read_record
from pipeline.versions import NOTHING, Version

LEASE_FILE = "lease"
"""Who writes into a directory; on a disk a folder, see `versions`."""
BEAT_SECONDS = 5.0
"""Between two signs of life of a job."""
SILENCE_SECONDS = 30.0
"""After which a job that gave no sign of life counts as dead."""
_SUPERSEDED = "another job has begun to train this run; it goes on, this one ends"
_BOOT, _PIDS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


class Superseded(UserError):
    """Another job or a later attempt writes to the run, so this one must not any more."""


@dataclass(frozen=True)
class _State:
    """What is known of the writer of a directory."""

    holder: str = ""
    """The job's token; empty: nobody."""
    who: str = ""
    """The job, for people."""
    machine: str = ""
    """Tells where `pid` means something; empty: nowhere."""
    pid: int = 0
    born: str = ""
    """When the process began, as numbers of processes are used again."""
    beat: int = 0
    """Signs of life."""
    attempt: str = ""
    """The newest attempt of the job's workers."""


@contextmanager
def held(out: str, patience: Patience, grace: float = 0.0) -> Iterator[str]:
    """Holds a directory's lease for the length of the block.

    Args:
        out: run directory, or that of a recipe.
        patience: with its storage.
        grace: seconds in which another job that lives may still end.

    Yields:
        The holder's token, for the attempts of its workers.

    Raises:
        UserError: another job holds it, or it cannot be written to.
    """
    uri, own = storage.join(out, LEASE_FILE), _own()
    _take(uri, own, patience, grace)
    ended = threading.Event()
    thread = threading.Thread(target=_live, args=(uri, own.holder, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield own.holder
    finally:
        ended.set()
        thread.join()
        with suppress(UserError, OSError):  # else its silence frees it
            _change(uri, own.holder, lambda state: _State(beat=state.beat + 1))


class Attempt:
    """The right of one group of workers to write to a run directory, until a later group or another job has it."""

    def __init__(self, out: str, holder: str, patience: Patience) -> None:
        """Args: out: run directory; holder: the job's token, empty for none; patience: with the storage."""
        self.patience = patience
        self._uri, self._holder, self._name = storage.join(out, LEASE_FILE), holder, secrets.token_hex(8)

    def take(self) -> None:
        """Makes this the newest attempt.

        Raises:
            Superseded: another job has taken the run over.
        """
        taken = self.patience.retried(
            lambda: _change(self._uri, self._holder, lambda state: replace(state, attempt=self._name))
        )
        if not taken:
            raise Superseded(_SUPERSEDED)

    def write(self, uri: str, data: bytes) -> None:
        """Writes if this is the newest attempt, and retries while the storage is briefly in trouble.

        The token is looked at right before each try. Only a write that is already under way can still come late.

        Raises:
            Superseded: it is not.
            UserError: the storage stays away, or refuses.
        """

        def attempt() -> None:
            state = _state(versions.read(self._uri))
            if (state.holder, state.attempt) != (self._holder, self._name):
                raise Superseded(f"{uri}: {_SUPERSEDED}")
            storage.write_bytes(uri, data)

        self.patience.retried(attempt)


def check_free(out: str) -> str:
    """Looks at a directory's lease as a start would, without a wait and without taking it.

    Returns:
        The job that holds it and may live on another machine, which only its silence could tell; or an empty string.

    Raises:
        UserError: a job of this machine holds it and lives.
    """
    uri = storage.join(out, LEASE_FILE)
    state = _state(versions.read(uri))
    if not state.holder or _process_ended(state):
        return ""
    if _here(state):
        raise _refused(uri, state)
    return state.who


def _refused(uri: str, state: _State) -> UserError:
    out = uri.removesuffix(f"/{LEASE_FILE}")
    return UserError(f"{out} is being written by {state.who}: wait for it, end it, or use another --out")


def _take(uri: str, own: _State, patience: Patience, grace: float) -> None:
    """Waits until the directory is free, but for a job that lives only as long as `grace`."""
    began = time.monotonic()
    silent, since = NOTHING, began  # the last sign of life, and when it was seen
    while True:
        found = patience.retried(lambda: versions.read(uri))
        state = _state(found)
        now = time.monotonic()
        dead = _process_ended(state) or (found == silent and now - since >= SILENCE_SECONDS)
        if not state.holder or dead:
            if patience.retried(partial(versions.write, uri, _bytes(own), found)):
                return
            continue  # somebody else was first
        if now - began >= grace and (_here(state) or silent not in (NOTHING, found)):
            raise _refused(uri, state)
        if silent == NOTHING:
            print(
                f"{state.who} was here before and did not say that it has ended: listening for up to "
                f"{SILENCE_SECONDS:.0f} s whether it lives",
                flush=True,
            )
        if silent != found:
            silent, since = found, now
        time.sleep(1)


def _live(uri: str, holder: str, ended: threading.Event) -> None:
    """Shows that the job is alive, until it has ended or another one has taken its place."""
    while not ended.wait(BEAT_SECONDS):
        with suppress(UserError, OSError):  # the next one may come through
            if not _change(uri, holder, lambda state: replace(state, beat=state.beat + 1)):
                return


def _change(uri: str, holder: str, change: Callable[[_State], _State]) -> bool:
    """Changes the state unless another job holds the directory; whether it was changed."""
    while True:
        found = versions.read(uri)
        state = _state(found)
        if state.holder != holder:
            return False
        if versions.write(uri, _bytes(change(state)), found):
            return True


def _state(version: Version) -> _State:
    """What a version says; a damaged one is of somebody who is not known."""
    if version == NOTHING:
        return _State()
    try:
        return read_record(_State, version.data)
    except ValueError:
        return _State(holder="?", who="another job")


def _bytes(state: _State) -> bytes:
    return dumps(asdict(state)).encode()


# ---- this process -----------------------------------------------------------------------------------------------


def _own() -> _State:
    """The state of a directory that this process holds."""
    program, pid = Path(sys.argv[0]).name, os.getpid()
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    job = _submitted()
    named = f"job {job}, " if job else ""
    return _State(
        holder=secrets.token_hex(8),
        who=f"{program} ({named}process {pid} on {socket.gethostname()}, since {since})",
        machine=_machine(),
        pid=pid,
        born=_born(pid),
    )


def _submitted() -> str:
    """The name under which this process was submitted to a cluster, or an empty string."""
    with suppress(ValueError, KeyError, TypeError):
        return str(loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])
    return ""


def _born(pid: int) -> str:
    """When a process of this machine began, in ticks since its start; empty: there is none, or it has ended."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""


def _machine() -> str:
    """Names what numbers of processes belong to: this start of this kernel, and the container; empty: unknown."""
    return f"{_BOOT.read_text().strip()} {_PIDS.readlink()}" if _PIDS.is_symlink() else ""


def _here(state: _State) -> bool:
    """Whether the holder is, or was, a process that can be looked for here."""
    return bool(state.machine) and state.machine == _machine()


def _process_ended(state: _State) -> bool:
    return _here(state) and _born(state.pid) != state.born
