"""Which attempt of a run may write: a machine that was cut off and comes back must not overwrite a later attempt.

The attempt's name in a file is a fencing token: it is compared before each write.
"""

import secrets

from pipeline import storage
from pipeline.errors import UserError
from pipeline.storage import Patience

LEASE_FILE = "attempt"
"""Holds the name of the newest attempt."""


class Superseded(UserError):
    """A later attempt of the run has begun, so this one must not write any more.

    A user sees it only if two jobs train one run: the later one goes on.
    """


class Lease:
    """One attempt's right to write to a run directory, until another attempt takes it."""

    def __init__(self, out: str, patience: Patience) -> None:
        """Args: out: run directory; patience: with its storage."""
        self.patience = patience
        self._uri, self._name = storage.join(out, LEASE_FILE), secrets.token_hex(8).encode()

    def take(self) -> None:
        """Makes this the newest attempt."""
        self.patience.retried(lambda: storage.write_bytes(self._uri, self._name))

    def write(self, uri: str, data: bytes) -> None:
        """Writes if this is the newest attempt, and retries while the storage is briefly in trouble.

        The token is compared right before each try. Only a write that is already under way can still come late.

        Raises:
            Superseded: it is not.
            UserError: the storage stays away, or refuses.
        """

        def attempt() -> None:
            if storage.read_bytes(self._uri) != self._name:
                raise Superseded(f"{uri}: another job has begun to train this run; it goes on, this one ends")
            storage.write_bytes(uri, data)

        self.patience.retried(attempt)
