"""The trainer's surroundings: its device, the checkpoint to resume from, and where new ones go.

A run has one of two: a plain process, or a worker of Ray Train.
"""

import logging
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline import checkpoint, storage
from pipeline.checkpoint import META_FILE
from pipeline.ingest.read import Reader, read_inline, read_ray
from pipeline.storage import Patience
from pipeline.training.lease import Lease
from pipeline.training.recovery import UNSCORED, whole

if TYPE_CHECKING:
    from ray.train import Checkpoint
import os
import platform
from importlib.metadata import version

log = logging.getLogger(__name__)
NOTICE_STEPS = 10
"""Steps between two checks whether a node is about to be taken away. A check costs milliseconds on all ranks."""
NOTICE_SECONDS = 10.0
"""Seconds between checkpoints once a node is about to be taken away. Steps after the last one are repeated."""


class Runtime(ABC):
    """One rank's surroundings."""

    reader: Reader
    """How the unlabeled stream is read here."""
    cpus: float = 1.0
    """CPUs of this rank."""
    gpus: float = 0.0
    """GPUs of this rank: 1, a share of one, or 0."""
    threads: int = 1
    """CPU threads for decoding."""
    patience: Patience
    """With the storage, for all that this rank reads and writes."""
    lease: Lease
    """This attempt's right to write; rank 0 takes it."""

    @abstractmethod
    def device(self) -> torch.device:
        """Where this rank computes."""

    @abstractmethod
    def latest(self) -> str | None:
        """URI of the newest whole checkpoint of this run, or None."""

    def notice(self, step: int) -> bool:
        """Whether a machine of this run is about to be taken away and a checkpoint should be written now.

        Every rank calls it after every step and gets the same answer.
        """
        del step
        return False

    @abstractmethod
    def report(self, step: int, score: float | None, write: Callable[[Path], None] | None) -> None:
        """Hands over a checkpoint; every rank calls it equally often.

        Args:
            step: steps done.
            score: result of the evaluation at this step, None if there was none.
            write: fills a local folder with the checkpoint; None on the ranks that do not write.
        """


def _upload(folder: Path, uri: str, lease: Lease) -> None:
    """Copies a checkpoint; checkpoint.json goes last, as it makes it whole. Brief trouble of the storage is waited for.

    Raises:
        Superseded: a later attempt has begun.
        UserError: the storage stays away, or refuses.
    """
    for file in sorted(folder.iterdir(), key=lambda file: file.name == META_FILE):
        lease.write(storage.join(uri, file.name), file.read_bytes())


class PlainRuntime(Runtime):
    """One process without Ray: checkpoints go straight to the run directory."""

    reader = staticmethod(read_inline)

    def __init__(self, out: str) -> None:
        self._out, self.patience = out, Patience()
        self.lease = Lease(out, self.patience)
        self.gpus = float(torch.cuda.is_available())

    def device(self) -> torch.device:
        """A GPU if there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def latest(self) -> str | None:
        """The newest whole checkpoint."""
        names = whole(self._out)
        return storage.join(self._out, names[0]) if names else None

    def report(self, step: int, score: float | None, write: Callable[[Path], None] | None) -> None:
        """Copies the folder."""
        if write is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            _upload(Path(folder), storage.join(self._out, checkpoint.name(step)), self.lease)


class RayRuntime(Runtime):
    """A Ray Train worker: checkpoints are uploaded in the background and kept or pruned by Ray Train."""

    reader = staticmethod(read_ray)

    def __init__(self, out: str, resources: Mapping[str, float], patience: Patience) -> None:
        """Args: out: run directory; resources: of this worker, by Ray's names; patience: with the storage."""
        self._out, self.patience, self.lease = out, patience, Lease(out, patience)
        self.cpus, self.gpus = max(1.0, resources.get("CPU", 1.0)), resources.get("GPU", 0.0)
        self.threads = max(1, int(self.cpus) - 1)
        self._noticed: float | None = None

    def device(self) -> torch.device:
        """The device that Ray gave this worker."""
        import ray.train.torch

        return ray.train.torch.get_device()

    def latest(self) -> str | None:
        """The newest checkpoint that Ray Train knows: at the start that of `recover`, later one of this run's own."""
        import ray.train

        found = ray.train.get_checkpoint()
        return storage.join(self._out, Path(found.path).name) if found else None

    def notice(self, step: int) -> bool:
        """Asks Ray Train, which hears of drained nodes (`ray drain-node`, spot notices through the watcher).

        After the first checkpoint the run goes on until the node is gone, with more of them in short intervals.
        """
        import ray.train
        import ray.train.collective

        if step % NOTICE_STEPS:
            return False
        found = ray.train.get_preemption_info()  # what rank 0 knows
        if found is None:
            return False
        now = time.monotonic()
        due = self._noticed is None or now - self._noticed >= NOTICE_SECONDS
        due = ray.train.collective.broadcast_from_rank_zero(due)  # clocks differ
        if due:
            if self._noticed is None:
                left = (found.deadline_ms or 0) / 1000 - time.time()
                within = f" within {left:.0f} s" if found.deadline_ms else ""
                log.info(
                    "%d node(s) will be taken away%s: checkpoint at step %d",
                    len(found.preempted_node_ids),
                    within,
                    step,
                )
            self._noticed = now
        return due

    def report(self, step: int, score: float | None, write: Callable[[Path], None] | None) -> None:
        """A barrier over the ranks. The folder is Ray's after the call: it uploads and removes it."""
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        handed = None
        if write is not None:
            folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
            try:
                write(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            handed = Checkpoint.from_directory(folder)
        ray.train.report(
            {
                "step": step,
                "score": UNSCORED if score is None else score,
            },
            checkpoint=handed,
            checkpoint_dir_name=checkpoint.name(step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._uploaded,
            delete_local_checkpoint_after_upload=True,
        )

    def _uploaded(self, handed: "Checkpoint", name: str) -> "Checkpoint":
        """Runs in a thread of Ray Train, whose own way of copying gives up at the first trouble."""
        from ray.train import Checkpoint

        uri = storage.join(self._out, name)
        _upload(Path(handed.path), uri, self.lease)
        filesystem, path = storage.resolve(uri)
        return Checkpoint(path, filesystem)


_CPUINFO = Path("/proc/cpuinfo")


def machine(device: torch.device) -> dict[str, str | int]:
    """Name of the device, the node's processor and number of CPUs, versions of Python and what the step runs on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "cpus": os.cpu_count() or 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": version("ray"),
    }


def _processor() -> str:
    """The processor's model where Linux names it, else its architecture."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
