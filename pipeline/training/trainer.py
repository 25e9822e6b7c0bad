"""The training loop, the same in one plain process and under Ray Train."""

import hashlib
import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import checkpoint
from pipeline.batch import Batch
from pipeline.checkpoint import Progress, Score
from pipeline.config.schema import Config
from pipeline.datasets.prepared.dataset import Dataset, open_dataset
from pipeline.datasets.prepared.pseudo import open_labels
from pipeline.datasets.prepared.splits import load_split
from pipeline.errors import UserError
from pipeline.inference.evaluate import counted, evaluate
from pipeline.inference.load import autocast
from pipeline.ingest.loader import Loader
from pipeline.ingest.order import open_sources
from pipeline.methods import METHODS, Losses, Predictor, Step, build_method
from pipeline.models.norm import sync_batchnorm
from pipeline.ops import kernel
from pipeline.ops.world import World
from pipeline.training.meter import Meter
from pipeline.training.optim import build_optimizer, set_lr
from pipeline.training.runtime import Runtime, machine
from pipeline.training.trackers import Tracker

log = logging.getLogger(__name__)


def train(config: Config, runtime: Runtime) -> Progress:
    """Trains from the runtime's newest checkpoint, or from the start, to the last step; see `Trainer`."""
    return Trainer(config, runtime).train()


def _with_background(config: Config, dataset: Dataset) -> Config:
    """The config with the class that the dataset calls background, so that a checkpoint knows it."""
    if config.data.background != "auto":
        return config
    known = dataset.info.background
    return replace(config, data=replace(config.data, background="none" if known is None else str(known)))


class Trainer:
    """One attempt of a run on one rank: data, method, optimiser, progress."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        """Opens everything and takes up the newest checkpoint; no rank waits for another here.

        Args:
            config: `data.root` and `out` are set and valid on every worker.
            runtime: where this rank runs.

        Raises:
            UserError: dataset, split, weights or checkpoint cannot be used.
        """
        self.runtime = runtime
        self.world, self.device = World.current(), runtime.device()
        # the driver has read all this, so trouble is brief: it is waited for, as it may be the reason of a restart
        retried = runtime.patience.retried
        self.dataset = retried(lambda: open_dataset(str(config.data.root)))
        self.config = config = _with_background(config, self.dataset)
        self.split = retried(lambda: load_split(self.dataset, config.split, config.data.protocol))
        unlabeled = METHODS[config.method].views.unlabeled
        self.sources = retried(lambda: open_sources(config, self.dataset, self.split)) if unlabeled else []
        torch.manual_seed(config.seed)  # the same initial weights on every rank and for every number of ranks
        method = build_method(config, len(self.dataset.info.classes)).to(self.device).train()
        if self.world.size > 1:
            sync_batchnorm(method)
        self.method = method
        if self._compiles(len(self.dataset.info.classes)):
            kernel.activate(self.device)
        self.optimizer = build_optimizer(method, config.optim)
        self.progress = Progress()
        retried(self._restore)
        self.model: nn.Module = method
        self.loader = Loader(
            config, self.dataset, self.split, method.views, rank=self.world.rank, world=self.world.size,
            start=self.progress.step, threads=runtime.threads, reader=runtime.reader, patience=runtime.patience,
            sources=self.sources, pinned=self.device.type == "cuda",
        )  # fmt: skip

    def train(self) -> Progress:
        """The loop.

        Raises:
            UserError: too many damaged samples, a damaged shard, or a storage that stays away; on this rank alone.
            Diverged: a loss, parameter or buffer is not finite; names the step and its samples; on every rank alike.
        """
        config, start = self.config, self.progress.step
        if self.world.size > 1:  # buffers are equal on all ranks by construction; broadcasting a bank would be slow
            self.model = DistributedDataParallel(self.method, broadcast_buffers=False)
        rank0 = self.world.rank == 0
        tracker = None
        if rank0:
            self.runtime.lease.take()
            tracker = Tracker(str(config.out), start, self.runtime.lease, tensorboard=config.run.tensorboard)
        meter = Meter(config, self.world, self.loader, self.device)
        try:
            for index, batch in zip(range(start, config.optim.steps), self.loader, strict=False):
                # ---- one step ---------------------------------------------------------------------------
                lr = set_lr(self.optimizer, config.optim, index)
                losses = self.step(batch.to(self.device), index)
                meter.add(index, losses, batch)
                done = index + 1
                # ---- what follows a step, now and then --------------------------------------------------
                last = done == config.optim.steps
                if done % config.run.log_every == 0 or last:
                    record = meter.summary(done, lr)
                    if tracker:
                        tracker.log("train", done, record)
                        log.info(meter.line(done, record))
                scored = done % config.eval.every == 0 or last
                if scored or done % config.run.checkpoint_every == 0 or self.runtime.notice(done):
                    meter.check()  # a checkpoint after a bad step could never be resumed
                    meter.check_state(self.method.state_dict())
                    with meter.paused():
                        if scored:
                            self.evaluate(tracker)
                        self.save(scored)
                        if tracker:
                            tracker.flush()
        finally:
            self.loader.close()
            if tracker:
                tracker.close()
        return self.progress

    def data(self) -> dict[str, Any]:
        """What the run reads, so that a resume with other data is refused."""
        info, labels = self.dataset.info, self.config.data.pseudo_labels
        known = {"index": info.index_hash, "split": self.split.digest, "classes": list(info.classes)}
        pools = [[source.digest, source.generations] for source in self.sources if source.generations]
        if pools:
            known["pools"] = pools
        if labels is not None:
            known["pseudo_labels"] = open_labels(labels, self.dataset).digest
        return known

    def about(self) -> dict[str, Any]:
        """What the run is made of and with; unlike `data` and the config it may change when a run is resumed."""
        return {
            "dataset": self.dataset.info.name,
            "palette": self.dataset.info.palette,
            "evaluation": self.dataset.info.evaluation,
            "protocol": self.config.data.protocol or self.dataset.info.protocol,
            "labeled": len(self.split.labeled),
            "unlabeled": len(self.split.unlabeled),
            "workers": self.world.size,
            "worker_cpus": self.runtime.cpus,
            "worker_gpus": self.runtime.gpus,
            **machine(self.device),
        }

    def _compiles(self, classes: int) -> bool:
        """Whether to compile the losses: at small sizes on a CPU it takes longer than it saves."""
        choice, (height, width) = self.config.run.compile, self.config.data.crop
        work = self.config.optim.batch_unlabeled // self.world.size * height * width * classes
        return choice == "on" or (choice == "auto" and (self.device.type == "cuda" or work >= 4_000_000))

    def _restore(self) -> None:
        """Takes up the newest checkpoint, if there is one."""
        uri = self.runtime.latest()
        if uri is None:
            return
        if checkpoint.read_meta(uri).data != self.data():
            raise UserError(f"{uri}: was trained on other images or another split; use --fresh or another --out")
        state = checkpoint.read_state(uri)
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress.from_dict(state["progress"])
        if self.world.rank == 0:
            log.info("resuming from %s, step %d", uri, self.progress.step)

    def step(self, batch: Batch, index: int) -> Losses:
        """Forward, backward, clip, update: the step that everything else is about."""
        seed_step(self.config.seed, index, self.world.rank)
        step = Step(index, self.config.optim.steps, self.config.seed, self.world)
        with autocast(self.device, self.config.run):
            losses: Losses = self.model(batch, step)
        total = torch.stack(list(losses.terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if self.config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self.method.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.method.after_step(step)
        self.progress.step = index + 1
        return losses

    def evaluate(self, tracker: Tracker | None) -> None:
        """Scores every network of the method on the validation set, shared among the ranks."""
        began, miou = time.perf_counter(), dict[str, float]()
        iou: list[float | None] = []
        for name, network in self.method.networks().items():
            with autocast(self.device, self.config.run):
                matrix = evaluate(
                    Predictor(network),
                    self.dataset,
                    self.config.eval,
                    self.device,
                    self.world.rank,
                    self.world.size,
                    self.runtime.patience,
                )
            matrix.all_reduce()
            scores = matrix.scores()
            miou[name] = scores.miou
            iou = iou or list(scores.iou)
        self.progress.scored(Score(self.progress.step, miou, iou))
        spent = round((time.perf_counter() - began) * self.world.size, 3)
        if tracker:
            tracker.log("eval", self.progress.step, {"miou": miou, "iou": iou, "worker_seconds": spent})
            shown = "  ".join(f"{name} {100 * value:.2f}" for name, value in miou.items())
            log.info("step %6d  val mIoU %%  %s%s", self.progress.step, shown, counted(iou))

    def save(self, scored: bool) -> None:
        """Hands a checkpoint to the runtime; state is equal on all ranks, so rank 0 writes it."""
        write = partial(
            checkpoint.save,
            config=self.config,
            data=self.data(),
            about=self.about(),
            progress=self.progress,
            method=self.method.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )
        score = self.progress.last.value if scored and self.progress.last else None
        self.runtime.report(self.progress.step, score, write if self.world.rank == 0 else None)


def seed_step(seed: int, index: int, rank: int) -> None:
    """Seeds torch for one step (dropout), so that no generator state has to be saved."""
    digest = hashlib.blake2b(f"{seed}/{index}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
