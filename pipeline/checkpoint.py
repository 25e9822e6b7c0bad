"""One checkpoint: everything a run needs to go on, and everything `evaluate` needs to score it.

A folder with `state.pt` (tensors and plain values: networks, optimiser, memory bank, progress) and `checkpoint.json`
(step, score, resolved config, what it was made with, SHA-256 of state.pt). The data position and all randomness follow
from the step, so nothing else has to be kept.
"""

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pipeline
from pipeline import storage
from pipeline.config.schema import Config, as_dict
from pipeline.errors import UserError
from pipeline.records import read_record

STATE_FILE = "state.pt"
META_FILE = "checkpoint.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
TRACKING_FILE = "tracking_id"
LOG_FILE = "log.txt"
PICTURES = "pictures"
"""The last six lie beside the checkpoints in the run directory; the log is that of a sweep's trial."""
TEACHER, STUDENT = "teacher", "student"
"""Where the two runs of self-training lie below the directory of the recipe; the student is its result."""


@dataclass(frozen=True)
class Score:
    """One evaluation."""

    step: int
    """Training steps done before it."""
    miou: dict[str, float]
    """0..1 by network; the first one is the method's result."""
    iou: list[float | None]
    """By class, of the first network; None for a class that does not occur."""

    def __post_init__(self) -> None:
        if not self.miou:
            raise ValueError("no mIoU")

    @property
    def value(self) -> float:
        """The result's mIoU, 0..1."""
        return next(iter(self.miou.values()))


@dataclass
class Progress:
    """Steps done and scores of a run."""

    step: int = 0
    """Steps done, which is also the index of the next one."""
    last: Score | None = None
    best: Score | None = None

    def scored(self, score: Score) -> None:
        """Records a new evaluation as the last one, and as the best one if it is."""
        self.last = score
        if self.best is None or score.value > self.best.value:
            self.best = score

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Reads what `asdict` gave."""
        scores = {name: Score(**values[name]) if values[name] else None for name in ("last", "best")}
        return cls(values["step"], **scores)


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The content of checkpoint.json."""

    step: int
    last: Score | None = None
    """The newest evaluation."""
    sha256: str
    """Of state.pt."""
    version: str = ""
    """Of this program."""
    data: dict[str, Any]
    """What the run reads, see `save`."""
    about: dict[str, Any] = field(default_factory=dict)
    """What it was made of and with, see `save`."""
    config: dict[str, Any]
    """The resolved config, as plain values."""


def save(
    folder: Path,
    config: Config,
    data: dict[str, Any],
    about: dict[str, Any],
    progress: Progress,
    **parts: dict[str, Any],
) -> None:
    """Writes a checkpoint into a local folder.

    Args:
        folder: exists.
        config: resolved config of the run.
        data: what the run reads: digests (`index`, `split`, those of `pools` if there are any) and `classes` by name.
        about: what it was made of and with, for people: names, counts, hardware, versions.
        progress: where the run stands.
        parts: state dicts by name (`method`, `optimizer`, in float16 `scaler`).

    Raises:
        OSError: the disk is full.
    """
    import torch  # here, as most readers of this module look at records alone

    with (folder / STATE_FILE).open("wb") as opened:
        file = _Hashed(opened)
        try:
            torch.save({**parts, "progress": asdict(progress)}, file)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch does not say why a write failed
            if file.problem is None:
                raise
            raise file.problem from error
    meta = Meta(
        step=progress.step, last=progress.last, sha256=file.digest.hexdigest(), version=pipeline.__version__, data=data,
        about=about, config=as_dict(config),
    )  # fmt: skip
    (folder / META_FILE).write_text(json.dumps(asdict(meta), indent=1))


class _Hashed:
    """A file with the SHA-256 of what was written to it: no second copy in memory, and no other thread is held up."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.problem: OSError | None = None
        """Why it could not be written."""

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.problem = error
            raise

    def flush(self) -> None:
        self._file.flush()


def name(step: int) -> str:
    """Folder of the checkpoint after `step` steps."""
    return f"step_{step:07d}"


def is_name(folder: str) -> bool:
    """Whether a folder's name is one that `name` gives."""
    return re.fullmatch(r"step_\d{7,}", folder) is not None


def written(run: str) -> list[str]:
    """Names of the checkpoints in a run directory that were written to their end, the highest step first."""
    found = [re.fullmatch(rf"(step_(\d+))/{META_FILE}", file) for file in storage.list_files(run)]
    steps = {int(match[2]): match[1] for match in found if match}
    return [steps[step] for step in sorted(steps, reverse=True)]


def halves(run: str) -> list[str]:
    """Names of the checkpoints in a run directory that were begun and not written to their end, in order."""
    folders = {file.partition("/")[0] for file in storage.list_files(run)}
    return sorted(filter(is_name, folders - {*written(run)}))


def newest(run: str) -> str | None:
    """URI of the first of those that `written` names, or None; it may have been damaged since."""
    names = written(run)
    return storage.join(run, names[0]) if names else None


def verify(uri: str) -> Meta:
    """The meta of a checkpoint that is whole: its state is what it was when it was written.

    Raises:
        UserError: something is missing, cannot be read, or has another SHA-256.
    """
    meta, place = read_meta(uri), storage.join(uri, STATE_FILE)
    if hashlib.sha256(storage.read_bytes(place)).hexdigest() != meta.sha256:
        raise UserError(f"{place}: damaged (its SHA-256 differs from {META_FILE})")
    return meta


def find(uri: str) -> str:
    """The checkpoint at `uri`, or the newest one of the run directory `uri`.

    Raises:
        UserError: neither is there.
    """
    if storage.exists(storage.join(uri, META_FILE)):
        return uri
    run = newest(uri)
    if run is None:
        raise UserError(
            f"{uri}: no checkpoint there ({META_FILE} is missing); name a run or a folder like RUN/{name(900)}"
        )
    return run


def read_meta(uri: str) -> Meta:
    """The content of checkpoint.json below `uri`.

    Raises:
        UserError: it is missing or cannot be read.
    """
    place = storage.join(uri, META_FILE)
    try:
        return read_record(Meta, storage.read_bytes(place))
    except ValueError as error:
        raise UserError(f"{place}: not readable ({error}); take another checkpoint of the run") from error


def read_summary(uri: str) -> Progress:
    """The content of a finished run's summary.json.

    Raises:
        UserError: it is damaged.
    """
    try:
        progress = read_record(Progress, storage.read_bytes(uri))
        if progress.last is None or progress.best is None:
            raise ValueError("no score")
        return progress
    except ValueError as error:
        remedy = "remove it and give the run's command again, which writes it anew"
        raise UserError(f"{uri}: damaged ({error}); {remedy}") from error


def read_state(uri: str) -> dict[str, Any]:
    """The content of state.pt below `uri`, on the CPU; nothing in it is executed.

    Raises:
        UserError: it is damaged (its SHA-256 differs) or holds more than tensors and plain values.
    """
    import torch

    place = storage.join(uri, STATE_FILE)
    payload = storage.read_bytes(place)
    if hashlib.sha256(payload).hexdigest() != read_meta(uri).sha256:
        raise UserError(f"{place}: damaged (its SHA-256 differs from {META_FILE}); take another checkpoint of the run")
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; all mean that this is not our file
        raise UserError(f"{place}: not a checkpoint of this program: {' '.join(str(error).split())[:200]}") from error
