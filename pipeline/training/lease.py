"""Which attempt of a run may write: a machine that was cut off and comes back must not undo what others did."""

import secrets

from pipeline import storage
from pipeline.errors import UserError

LEASE_FILE = "attempt"
"""Holds the name of the newest attempt."""


class Superseded(UserError):
    """A later attempt of the run has begun; what this one still has to say is of no use.

    The user hears of it only if two jobs train one run: the later one goes on.
    """


class Lease:
    """One attempt's right to write to a run directory, until another attempt takes it."""

    def __init__(self, out: str) -> None:
        """Args: out: run directory."""
        self._uri, self._name = storage.join(out, LEASE_FILE), secrets.token_hex(8).encode()

    def take(self) -> None:
        """Makes this the newest attempt."""
        storage.retried(lambda: storage.write_bytes(self._uri, self._name))

    def write(self, uri: str, data: bytes) -> None:
        """Writes while this is the newest attempt; brief trouble of the storage is waited for.

        Looked at right before each try, so that only what is on its way in this moment can still come late.

        Raises:
            Superseded: it is not.
            UserError: the storage stays away, or refuses.
        """

        def attempt() -> None:
            if storage.read_bytes(self._uri) != self._name:
                raise Superseded(f"{uri}: another job has begun to train this run; it goes on, this one ends")
            storage.write_bytes(uri, data)

        storage.retried(attempt)
