"""The trainer's surroundings: its device, the checkpoint to resume from, and where new ones go.

A run has one of two: a plain process, or a worker of Ray Train.
"""

import logging
import math
import os
import platform
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipeline import checkpoint, storage
from pipeline.checkpoint import META_FILE
from pipeline.inference.load import any_device
from pipeline.ingest.read import Reader, read_inline, read_ray
from pipeline.patience import Patience
from pipeline.training.lease import Attempt
from pipeline.training.recovery import UNSCORED, whole

if TYPE_CHECKING:
    from ray.train import Checkpoint

    from pipeline.cluster.console import StopAsked

log = logging.getLogger(__name__)
NOTICE_SECONDS = 10.0
"""Seconds between checkpoints once a node is about to be taken away. Steps after the last one are repeated."""


class Wish(IntEnum):
    """What a run is asked for from outside."""

    GO_ON = 0
    CHECKPOINT = 1
    """A machine is about to be taken away."""
    STOP = 2
    """A checkpoint, and the end."""


class Runtime(ABC):
    """One rank's surroundings."""

    reader: Reader
    """How images are read here."""
    labeled: Sequence[Any] = ()
    """Labeled images that the driver has read for all ranks, by `ingest.read.share`."""
    cpus: float = 1.0
    """CPUs of this rank."""
    gpus: float = 0.0
    """GPUs of this rank: 1, a share of one, or 0."""
    threads: int = 1
    """CPU threads for decoding."""
    patience: Patience
    """With the storage, for all that this rank reads and writes."""
    attempt: Attempt
    """The right to write; rank 0 takes it."""
    _writing: Future[None] | None = None
    """The checkpoint that a thread is writing."""

    @abstractmethod
    def device(self) -> torch.device:
        """Where this rank computes."""

    @abstractmethod
    def latest(self) -> str | None:
        """URI of the newest whole checkpoint of this run, or None."""

    def wish(self, step: int) -> Wish:
        """What is wanted after `step`; every rank calls it after every step and gets the same answer."""
        del step
        return Wish.GO_ON

    @abstractmethod
    def report(self, step: int, score: float | None, write: Callable[[Path], None] | None) -> None:
        """Hands over a checkpoint, which a thread writes; every rank calls it equally often, after `drain`.

        Args:
            step: steps done.
            score: result of the evaluation at this step, None if there was none.
            write: fills a local folder with the checkpoint, in that thread; None on the ranks that do not write.
        """

    def drain(self) -> None:
        """Waits until the checkpoint that was handed over is where it belongs.

        Raises:
            Superseded: a later attempt has begun.
            UserError: the storage stays away, or refuses.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _upload(folder: Path, uri: str, attempt: Attempt) -> None:
    """Copies a checkpoint; checkpoint.json goes last, as it makes it whole. Brief trouble of the storage is waited for.

    Raises:
        Superseded: a later attempt has begun.
        UserError: the storage stays away, or refuses.
    """
    for file in sorted(folder.iterdir(), key=lambda file: file.name == META_FILE):
        attempt.write(storage.join(uri, file.name), file.read_bytes())


class PlainRuntime(Runtime):
    """One process without Ray: checkpoints go straight to the run directory."""

    reader = staticmethod(read_inline)

    def __init__(self, out: str) -> None:
        self._out, self.patience = out, Patience()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self.attempt = Attempt(out, "", self.patience)
        self.gpus = float(torch.cuda.is_available())

    def device(self) -> torch.device:
        """A GPU if there is one."""
        return any_device()

    def latest(self) -> str | None:
        """The newest whole checkpoint."""
        names = whole(self._out)
        return storage.join(self._out, names[0]) if names else None

    def report(self, step: int, score: float | None, write: Callable[[Path], None] | None) -> None:
        """Goes through a folder of its own."""
        if write is not None:
            self._writing = self._thread.submit(self._written, write, storage.join(self._out, checkpoint.name(step)))

    def _written(self, write: Callable[[Path], None], uri: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            _upload(Path(folder), uri, self.attempt)


class RayRuntime(Runtime):
    """A Ray Train worker: its thread writes checkpoints, and it keeps or prunes them."""

    reader = staticmethod(read_ray)

    def __init__(
        self, out: str, holder: str, resources: Mapping[str, float], patience: Patience, stop: "StopAsked | None"
    ) -> None:
        """One rank of a run.

        Args:
            out: run directory.
            holder: of its lease.
            resources: of this worker, by Ray's names.
            patience: with the storage.
            stop: whether the run is to stop; rank 0 knows it.
        """
        self._out, self.patience, self.attempt = out, patience, Attempt(out, holder, patience)
        self.cpus, self.gpus = max(1.0, resources.get("CPU", 1.0)), resources.get("GPU", 0.0)
        self.threads = max(1, int(self.cpus) - 1)
        self._stop, self._agreement, self._noticed = stop, Agreement(), -math.inf

    def device(self) -> torch.device:
        """The device that Ray gave this worker."""
        import ray.train.torch

        return ray.train.torch.get_device()

    def latest(self) -> str | None:
        """The newest checkpoint that Ray Train knows: at the start that of `recover`, later one of this run's own."""
        import ray.train

        found = ray.train.get_checkpoint()
        return storage.join(self._out, Path(found.path).name) if found else None

    def wish(self, step: int) -> Wish:
        """What rank 0 knows, one step later: the driver wants to stop, or Ray has told that a node will be taken away.

        Training goes on until a node is gone, with checkpoints in short intervals.
        """
        return Wish(self._agreement.greatest(self._own_wish(step) if self._stop is not None else Wish.GO_ON))

    def _own_wish(self, step: int) -> Wish:
        from pipeline.cluster.internals import preemption

        if self._stop:
            return Wish.STOP
        found, now = preemption(), time.monotonic()
        if found is None or now - self._noticed < NOTICE_SECONDS:
            return Wish.GO_ON
        if self._noticed == -math.inf:
            left = (found.deadline_ms or 0) / 1000 - time.time()
            within = f" within {left:.0f} s" if found.deadline_ms else ""
            count = len(found.preempted_node_ids)
            log.info("%d node(s) will be taken away%s: a checkpoint after step %d", count, within, step)
        self._noticed = now
        return Wish.CHECKPOINT

    def report(self, step: int, score: float | None, write: Callable[[Path], None] | None) -> None:
        """A barrier over the ranks. Ray gets an empty folder, which its thread has filled and uploads and removes."""
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        handed, upload = None, None
        if write is not None:
            with storage.translated(tempfile.gettempdir()):
                handed = Checkpoint.from_directory(tempfile.mkdtemp(prefix="checkpoint-"))
            self._writing = Future()
            upload = partial(self._uploaded, write, self._writing)
        ray.train.report(
            {
                "step": step,
                "score": UNSCORED if score is None else score,
            },
            checkpoint=handed,
            checkpoint_dir_name=checkpoint.name(step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=True,
        )

    def _uploaded(
        self, write: Callable[[Path], None], done: Future[None], handed: "Checkpoint", name: str
    ) -> "Checkpoint":
        """Runs in a thread of Ray Train, whose own way of copying gives up at the first trouble."""
        from ray.train import Checkpoint

        folder, uri = Path(handed.path), storage.join(self._out, name)
        if done.done():  # Ray tries some errors again; the patience with them is used up
            done.result()
        try:
            with storage.translated(str(folder)):
                write(folder)
            _upload(folder, uri, self.attempt)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            done.set_exception(error)
            raise
        done.set_result(None)
        filesystem, path = storage.resolve(uri)
        return Checkpoint(path, filesystem)


class Agreement:
    """What the ranks want, the same on all of them after each step, without a wait for the device or the network.

    The exchange of a step is awaited after the next one, when it has long been done; it goes through the CPUs.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def greatest(self, own: int) -> int:
        """The greatest value of any rank at the call before this one; 0 at first. Alone: this rank's, at once."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return own
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        before, value = self._pending, torch.tensor(own)
        self._pending = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True), value
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])


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
