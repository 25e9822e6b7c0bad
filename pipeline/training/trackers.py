"""Where numbers and pictures go: files of the run always, TensorBoard by default, services if asked."""

import io
import json
import math
import re
import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import checkpoint, storage
from pipeline.checkpoint import METRICS_FILE, PICTURES, TRACKING_FILE
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.patience import Patience
from pipeline.records import read_record
from pipeline.training.lease import Attempt
from pipeline.training.services import Sender, chosen, scalars

FLUSH_SECONDS = 10.0
PAGE = ".png"
"""How a step's file in the folder of pictures ends."""


class Tracker:
    """Records of one run, written by rank 0 alone. After a resume, later records of the lost attempt are dropped."""

    def __init__(self, config: Config, start: int, attempt: Attempt, classes: Sequence[str] = ()) -> None:
        """Begins with what earlier attempts have left.

        Args:
            config: of the run; its `out` is set.
            start: steps done before this attempt.
            attempt: that this process has taken.
            classes: names by class id, under which TensorBoard and services get the `iou` of a record.
        """
        self._classes = tuple(classes)
        out = str(config.out)
        self._attempt = attempt
        self._uri = storage.join(out, METRICS_FILE)
        self._lines = self._kept(start)
        self._flushed = time.monotonic()
        events = storage.join(out, "tensorboard") if config.run.tensorboard else None
        self._events = _Events(events, start, attempt.patience) if events else None
        self._pages = _Steps(storage.join(out, PICTURES), PAGE, start, attempt)
        self._images = _Steps(storage.join(events, PICTURES), ".tfevents", start, attempt) if events else None
        names = chosen(config)
        token = self._token(storage.join(out, TRACKING_FILE)) if names else ""
        self._senders = [Sender(name, config, token) for name in names]

    def _token(self, uri: str) -> str:
        """By which services know the run: one that goes on is the same to them; `--fresh` deletes the file."""
        if storage.exists(uri):
            return storage.read_text(uri).strip()
        token = secrets.token_hex(8)
        self._attempt.write(uri, token.encode())
        return token

    def _kept(self, start: int) -> list[str]:
        if start == 0 or not storage.exists(self._uri):
            return []
        lines = storage.read_bytes(self._uri).decode(errors="replace").splitlines()
        return [line for number, line in enumerate(lines, 1) if read_step(line, f"{self._uri}: line {number}") <= start]

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Adds a record: `kind` is train or eval, values are numbers, lists or dicts of them. It gets the time, UTC."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = {"kind": kind, "step": step, "time": now, **{key: _finite(value) for key, value in values.items()}}
        self._lines.append(json.dumps(record))
        if "iou" in values:
            values = {**values, "iou": dict(zip(self._classes, values["iou"], strict=False))}
        if self._events:
            self._events.add(kind, step, values)
        for sender in self._senders:
            sender.add(kind, step, values)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def show(self, step: int, page: Image.Image, images: Mapping[str, Image.Image]) -> None:
        """Writes the pictures of a step, at once: `page` as PNG and to services, `images` by name for TensorBoard.

        Raises:
            Superseded: a later attempt has begun.
            UserError: the storage stays away, or refuses.
        """
        buffer = io.BytesIO()
        page.save(buffer, "png")
        self._pages.write(step, buffer.getvalue())
        if self._images:
            self._images.write(step, _image_events(step, images))
        for sender in self._senders:
            sender.show(step, page)

    def flush(self) -> None:
        """Makes all records durable. The file is replaced as a whole: object stores cannot append.

        Raises:
            Superseded: a later attempt has begun.
            UserError: the storage stays away, or refuses.
        """
        text = "".join(f"{line}\n" for line in self._lines).encode()
        self._attempt.write(self._uri, text)
        if self._events:
            self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and ends."""
        try:
            self.flush()
        finally:
            for sender in self._senders:
                sender.close()
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
        with storage.translated(self._folder):
            self._writer = SummaryWriter(self._folder, purge_step=start + 1, filename_suffix=f".from_{start}")

    def add(self, kind: str, step: int, values: dict[str, Any]) -> None:
        for name, number in scalars(kind, values):
            self._writer.add_scalar(name, number, step)

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


class _Steps:
    """A folder with one file for each step that has one. Those after `start` are of a lost attempt and go."""

    def __init__(self, uri: str, ending: str, start: int, attempt: Attempt) -> None:
        self._uri, self._ending, self._attempt = uri, ending, attempt
        attempt.patience.retried(lambda: delete_steps(uri, ending, start))

    def write(self, step: int, data: bytes) -> None:
        self._attempt.write(storage.join(self._uri, checkpoint.name(step) + self._ending), data)


def delete_steps(uri: str, ending: str, after: int = -1) -> None:
    """Deletes the files of a folder that are called step_N and `ending`, of steps after `after`, and nothing else."""
    for name in storage.list_files(uri):
        found = re.fullmatch(rf"step_(\d+){re.escape(ending)}", name)
        if found and int(found[1]) > after:
            storage.delete(storage.join(uri, name))


def _image_events(step: int, images: Mapping[str, Image.Image]) -> bytes:
    """A file of TensorBoard with these pictures alone: one that grew by them would be copied whole at each flush."""
    from tensorboardX import SummaryWriter

    with storage.translated(tempfile.gettempdir()), tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for name, image in images.items():
                writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


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
