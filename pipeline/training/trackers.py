"""Where numbers go: metrics.jsonl always, TensorBoard by default, one readable line on the console."""

import json
import math
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.checkpoint import METRICS_FILE
from pipeline.errors import UserError
from pipeline.records import read_record
from pipeline.storage import Patience
from pipeline.training.lease import Lease

FLUSH_SECONDS = 10.0


class Tracker:
    """Records of one run, written by rank 0 alone. After a resume, later records of the lost attempt are dropped."""

    def __init__(self, out: str, start: int, lease: Lease, *, tensorboard: bool) -> None:
        """Begins with what earlier attempts have left.

        Args:
            out: run directory.
            start: steps done before this attempt.
            lease: that this attempt has taken.
            tensorboard: write events as well.
        """
        self._lease = lease
        self._uri = storage.join(out, METRICS_FILE)
        self._lines = self._kept(start)
        self._flushed = time.monotonic()
        self._events = _Events(storage.join(out, "tensorboard"), start, lease.patience) if tensorboard else None

    def _kept(self, start: int) -> list[str]:
        if start == 0 or not storage.exists(self._uri):
            return []
        lines = storage.read_bytes(self._uri).decode(errors="replace").splitlines()
        return [line for number, line in enumerate(lines, 1) if read_step(line, f"{self._uri}: line {number}") <= start]

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Adds a record: `kind` is train or eval, values are numbers, lists or dicts of them."""
        self._lines.append(json.dumps({"kind": kind, "step": step, **{k: _finite(v) for k, v in values.items()}}))
        if self._events:
            self._events.add(kind, step, values)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes all records durable. The file is replaced as a whole: object stores cannot append.

        Raises:
            Superseded: a later attempt has begun.
            UserError: the storage stays away, or refuses.
        """
        text = "".join(f"{line}\n" for line in self._lines).encode()
        self._lease.write(self._uri, text)
        if self._events:
            self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and ends."""
        self.flush()
        if self._events:
            self._events.close()


@dataclass(frozen=True)
class _Line:
    step: int


def read_step(line: str, where: str) -> int:
    """The step of a record.

    Raises:
        UserError: the line is damaged.
    """
    try:
        return read_record(_Line, line).step
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}); remove the line, then the same command goes on") from error


class _Events:
    """TensorBoard events, written locally and copied when the run lives elsewhere."""

    def __init__(self, uri: str, start: int, patience: Patience) -> None:
        from tensorboardX import SummaryWriter

        self._patience = patience
        self._remote = None if storage.is_local(uri) else uri
        self._scratch = tempfile.TemporaryDirectory() if self._remote else None
        self._folder = self._scratch.name if self._scratch else storage.resolve(uri)[1]
        # what a lost attempt wrote after `start` is purged; file names have seconds only, so the suffix sets them apart
        self._writer = SummaryWriter(self._folder, purge_step=start + 1, filename_suffix=f".from_{start}")

    def add(self, kind: str, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            for label, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, int | float):
                    self._writer.add_scalar(f"{kind}/{name}{label and '/' + label}", number, step)

    def flush(self) -> None:
        self._writer.flush()
        if self._remote:
            for file in Path(self._folder).iterdir():
                uri = storage.join(self._remote, file.name)
                self._patience.retried(partial(storage.write_bytes, uri, file.read_bytes()))

    def close(self) -> None:
        self._writer.close()
        self.flush()
        if self._scratch:
            self._scratch.cleanup()


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON lacks; inside lists and dicts too."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """Seconds as 1h02m, 3m20s or 45s."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
