"""Run directories as they were left: config, records, scores, and what they were made of and with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline import checkpoint, storage
from pipeline.checkpoint import CONFIG_FILE, METRICS_FILE, STUDENT, SUMMARY_FILE, TEACHER, Progress, Score
from pipeline.config import cli
from pipeline.config.cli import Sections
from pipeline.config.schema import Config, read_file
from pipeline.datasets.prepared.dataset import Dataset, open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.errors import UserError
from pipeline.records import read_record

UNKNOWN = "not recorded"


@dataclass(frozen=True, kw_only=True)
class About:
    """What a run was made of and with; None or empty if it did not record it."""

    dataset: str
    """For people."""
    protocol: str
    index: str | None
    """SHA-256 of the dataset's index."""
    digest: str | None
    """That of the split's list."""
    labeled: int | None
    unlabeled: int | None
    classes: tuple[str, ...]
    version: str | None
    """Of this program."""
    workers: int | None
    worker_cpus: float | None
    """CPUs that each worker computed with."""
    worker_gpus: float | None
    """GPUs of each worker; a share of one, where runs share it."""
    machine: Mapping[str, str | int]
    """Device, processor, CPUs of a node, versions."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory, finished or not."""

    uri: str
    config: Config
    about: About
    records: Sequence[Mapping[str, Any]]
    """metrics.jsonl: those of training and of evaluations, in the order of steps."""
    progress: Progress
    """From the summary of a finished run, else from the records."""
    finished: bool
    teacher: Sequence[Mapping[str, Any]] = ()
    """Records of the teacher that made the pseudo-labels, if the run is the student of self-training."""

    def curve(self, key: str) -> list[tuple[float, float]]:
        """A logged number of the training records over the steps; the mean over the classes of one by class.

        A part of a loss is `loss.NAME`.
        """
        section, _, name = key.rpartition(".")
        trained = [(record["step"], record.get(section, {}) if section else record) for record in self._trained]
        found = [(step, _mean(values.get(name))) for step, values in trained]
        return [(step, value) for step, value in found if value is not None]

    @property
    def losses(self) -> list[str]:
        """The parts of its loss, in the order in which they came."""
        return list(dict.fromkeys(name for record in self._trained for name in record.get("loss", {})))

    @property
    def _trained(self) -> list[Mapping[str, Any]]:
        return [record for record in self.records if record["kind"] == "train"]

    def scores(self) -> list[Score]:
        """Every evaluation."""
        return [_score(record) for record in self.records if record["kind"] == "eval"]

    @property
    def ended_early(self) -> bool:
        """Whether it is finished and has fewer steps than its config says: `eval.patience` ended it."""
        return self.finished and self.progress.step < self.config.optim.steps

    @property
    def cost(self) -> tuple[float, str] | None:
        """Hours of training and evaluation together, a student's with its teacher's; None where a record does not tell.

        Older versions did not record what a worker has: theirs are hours of workers.
        """
        spent = [record.get("worker_seconds") for record in (*self.teacher, *self.records)]
        if not spent or None in spent:
            return None
        hours = sum(spent) / 3600  # type: ignore[arg-type]
        if self.about.worker_gpus:
            return hours * self.about.worker_gpus, "GPU-hours"
        return (hours * self.about.worker_cpus, "CPU-hours") if self.about.worker_cpus else (hours, "worker-hours")


def find_runs(places: Sequence[str]) -> list[str]:
    """The run directories at or below `places`, each once; a teacher that has a student is part of the student's run.

    Args:
        places: run directories, or folders or URIs that hold some.

    Raises:
        UserError: a place holds none.
    """
    found: dict[str, None] = {}
    for place in places:
        bare = place.rstrip("/")
        files = storage.list_files(bare)
        below = [file.removesuffix(CONFIG_FILE).rstrip("/") for file in files if file.split("/")[-1] == CONFIG_FILE]
        if not below:
            raise UserError(f"{place}: no run there ({CONFIG_FILE} is missing); name runs, or folders that hold some")
        below = [name for name in below if _student_of(name) not in below]
        runs = [bare] if "" in below else [storage.join(bare, name) for name in below]
        found |= dict.fromkeys(runs)
    by_place = {storage.absolute(uri): uri for uri in reversed(found)}
    return [uri for uri in found if by_place[storage.absolute(uri)] == uri]


def _student_of(teacher: str) -> str | None:
    """Where the student lies of a run that could be a teacher."""
    folder, _, name = teacher.rpartition("/")
    return storage.join(folder, STUDENT) if folder and name == TEACHER else STUDENT if name == TEACHER else None


def read_run(uri: str, options: Sections) -> Run:
    """Reads a run directory.

    Args:
        uri: where `config.yaml` is.
        options: sections by method name; the config is completed with their defaults.

    Raises:
        UserError: a file is damaged; the message names it.
    """
    config = _config(storage.join(uri, CONFIG_FILE), options)
    records = _records(storage.join(uri, METRICS_FILE))
    summary = storage.join(uri, SUMMARY_FILE)
    finished = storage.exists(summary)
    progress = checkpoint.read_summary(summary) if finished else _progress(records)
    return Run(uri, config, _about(uri, config), records, progress, finished, _of_teacher(uri, config))


def _of_teacher(uri: str, config: Config) -> list[dict[str, Any]]:
    """The records of a student's teacher, which lies beside it."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    if not (config.data.pseudo_labels and folder and name == STUDENT):
        return []
    return _records(storage.join(folder, TEACHER, METRICS_FILE))


def _config(uri: str, options: Sections) -> Config:
    try:
        return cli.resolve(read_file(uri), options)
    except UserError as error:
        raise UserError(
            f"{uri}: not the config of a run ({error}); name runs, or folders that hold nothing else"
        ) from error


def _records(uri: str) -> list[dict[str, Any]]:
    lines = storage.read_bytes(uri).decode(errors="replace").splitlines() if storage.exists(uri) else []
    return [_record(line, f"{uri}: line {number}") for number, line in enumerate(lines, 1)]


@dataclass(frozen=True)
class _Line:
    """What every record has."""

    kind: str
    step: int


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        if read_record(_Line, line).kind == "eval":
            read_record(Score, line)
        return read_record(dict[str, Any], line)
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}); remove the line, or train the run anew") from error


def _score(record: Mapping[str, Any]) -> Score:
    return Score(record["step"], record["miou"], record["iou"])


def _progress(records: Sequence[Mapping[str, Any]]) -> Progress:
    progress = Progress(max((record["step"] for record in records), default=0))
    for record in records:
        if record["kind"] == "eval":
            progress.scored(_score(record))
    return progress


def _about(uri: str, config: Config) -> About:
    """From the newest checkpoint; names and counts that an older version did not record, from the dataset itself."""
    newest = checkpoint.newest(uri)
    meta = checkpoint.read_meta(newest) if newest else None
    data, about = meta.data if meta else {}, dict((meta and meta.about) or _of_dataset(config))
    named = ("dataset", "protocol", "labeled", "unlabeled", "workers", "worker_cpus", "worker_gpus")
    known = {name: about.pop(name, None) for name in named}
    index, digest = about.pop("index", None), about.pop("digest", None)
    return About(
        **known,
        index=data.get("index", index),
        digest=data.get("split", digest),
        classes=tuple(data.get("classes", ())),
        version=meta.version or None if meta else None,
        machine=about,
    )


def _of_dataset(config: Config) -> dict[str, Any]:
    root, protocol = str(config.data.root), config.data.protocol
    try:
        dataset = _opened(root)
        split = load_split(dataset, config.split, protocol)
    except UserError:  # it has moved, or is out of reach from here: the report can do without
        return {"dataset": root.rstrip("/").rsplit("/", 1)[-1], "protocol": protocol or "default"}
    return {
        "dataset": dataset.info.name,
        "protocol": protocol or dataset.info.protocol,
        "labeled": len(split.labeled),
        "unlabeled": len(split.unlabeled),
        "index": dataset.info.index_hash,
        "digest": split.digest,
    }


@lru_cache(maxsize=8)
def _opened(root: str) -> Dataset:
    return open_dataset(root)


def _mean(value: Any) -> float | None:
    numbers = [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, int | float)]
    return sum(numbers) / len(numbers) if numbers else None
