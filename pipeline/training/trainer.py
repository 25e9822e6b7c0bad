"""The training loop, the same in one plain process and under Ray Train."""

import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline import checkpoint
from pipeline.batch import Batch
from pipeline.checkpoint import Progress, Score
from pipeline.config.methods import SPECS
from pipeline.config.schema import Config, without_weights
from pipeline.datasets.prepared.dataset import Dataset, open_dataset
from pipeline.datasets.prepared.pseudo import open_labels
from pipeline.datasets.prepared.splits import load_split
from pipeline.errors import UserError
from pipeline.inference.class_table import counted
from pipeline.inference.evaluate import evaluate, read_images, spread
from pipeline.inference.load import autocast
from pipeline.inference.look import drawn, look
from pipeline.ingest.loader import Loader
from pipeline.ingest.order import open_sources
from pipeline.methods import Losses, Predictor, Step, build_method
from pipeline.models.compiled import compile_networks, release_networks, uncompiled
from pipeline.models.norm import sync_batchnorm
from pipeline.ops import kernel
from pipeline.ops.world import World
from pipeline.training.meter import Meter
from pipeline.training.optim import build_optimizer, build_scaler, set_lr, update
from pipeline.training.runtime import Runtime, Wish, machine
from pipeline.training.snapshot import snapshot
from pipeline.training.start import begin_with, find_start
from pipeline.training.trackers import Tracker

log = logging.getLogger(__name__)
TOLD_AT_THE_END = 1.0
"""Seconds for which training must have stood still for checkpoints before its end says so."""
PICTURE_SIDE = 256
"""Pixels of the longer side of the pictures of an evaluation: there may be hundreds of evaluations."""


def train(config: Config, runtime: Runtime) -> Progress:
    """Trains from the runtime's newest checkpoint, or from the start, to the last step; see `Trainer`."""
    return Trainer(config, runtime).train()


class StoppedEarly(Exception):
    """A run has stopped before its last step, as it was asked to."""

    def __init__(self, step: int) -> None:
        """Args: step: steps done, of which there is a checkpoint."""
        super().__init__(f"after step {step}")
        self.step = step


def _with_facts(config: Config, dataset: Dataset) -> Config:
    """The config with what the dataset says of its background and bands, so that a checkpoint knows it."""
    data, info = config.data, dataset.info
    if data.background == "auto":
        data = replace(data, background="none" if info.background is None else str(info.background))
    if info.mean and not data.mean:
        data = replace(data, mean=info.mean, std=info.std)
    return replace(config, data=data)


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
        self.config = config = _with_facts(config, self.dataset)
        self.split = retried(lambda: load_split(self.dataset, config.split, config.data.protocol))
        unlabeled = SPECS[config.method].views.unlabeled
        self.sources = retried(lambda: open_sources(config, self.dataset, self.split)) if unlabeled else []
        newest = runtime.latest()
        start = retried(lambda: find_start(config.model.weights)) if newest is None else None
        torch.manual_seed(config.seed)  # the same initial weights on every rank and for every number of ranks
        filled = newest is not None or start is not None
        method = build_method(without_weights(config) if filled else config, len(self.dataset.info.classes))
        if not filled and config.model.weights == "none" and self.world.rank == 0:
            log.info("encoder %s: from scratch, no pretrained weights", config.model.backbone)
        self.weights_digest = method.trained()[0].encoder.weights_digest
        method.to(self.device).train()
        if self.world.size > 1:
            sync_batchnorm(method)
        self.method = method
        self.compiled = self._compiles(len(self.dataset.info.classes))
        if self.compiled:
            kernel.activate(self.device)
        self.optimizer = build_optimizer(method, config.optim)
        self.scaler = build_scaler(self.device, config.run)
        self.progress = Progress()
        if newest is not None:
            retried(lambda: self._restore(newest))
        if start is not None:
            said = retried(lambda: begin_with(method, config.model, start, self.dataset.info.classes))
            if self.world.rank == 0:
                log.info(said)
        self.model: nn.Module = method
        self.loader = Loader(
            config, self.dataset, self.split, method.views, rank=self.world.rank, world=self.world.size,
            start=self.progress.step, threads=runtime.threads, reader=runtime.reader, patience=runtime.patience,
            sources=self.sources, shared=runtime.labeled, pinned=self.device.type == "cuda",
        )  # fmt: skip

    def train(self) -> Progress:
        """The loop.

        Raises:
            UserError: too many damaged samples, a damaged shard, or a storage that stays away; on this rank alone.
            StoppedEarly: the run is to stop; it has left a checkpoint; on every rank alike.
            Diverged: a loss, parameter or buffer is not finite; names the step and its samples; on every rank alike.
        """
        config, start = self.config, self.progress.step
        if self._settled():  # an attempt before this one has come so far, and was killed
            return self.progress
        if config.run.compile_network:
            self._compile_network()
        if self.world.size > 1:  # buffers are equal on all ranks by construction; broadcasting a bank would be slow
            ddp = DistributedDataParallel(self.method, broadcast_buffers=False, gradient_as_bucket_view=True)
            if config.run.gradients == "bf16":
                ddp.register_comm_hook(None, bf16_compress_hook)
            self.model = ddp
        rank0 = self.world.rank == 0
        tracker = None
        if rank0:
            self.runtime.attempt.take()
            tracker = Tracker(config, start, self.runtime.attempt, self.dataset.info.classes)
        self._say_what_comes()
        meter = Meter(config, self.world, self.loader, self.device)
        try:
            for index, batch in zip(range(start, config.optim.steps), self.loader, strict=False):
                # ---- one step ---------------------------------------------------------------------------
                lr = set_lr(self.optimizer, config.optim, index)
                meter.add(index, self.step(batch.to(self.device), index), batch)
                done = index + 1
                # ---- what follows a step, now and then --------------------------------------------------
                last = done == config.optim.steps
                if index == start:
                    self._say(meter, done, meter.first(done, lr))
                if done % config.run.log_every == 0 or last:
                    record = meter.summary(done, lr)
                    if tracker:
                        tracker.log("train", done, record)
                    if done > start + 1:
                        self._say(meter, done, record)
                scored = done % config.eval.every == 0 or last
                wish = self.runtime.wish(done)
                if scored or done % config.run.checkpoint_every == 0 or wish is not Wish.GO_ON:
                    meter.check()  # a checkpoint after a bad step could never be resumed
                    meter.check_state(self.method.state_dict())
                    with meter.paused(), uncompiled() if config.run.compile_network else nullcontext():
                        if scored:
                            self.evaluate(tracker)
                            if tracker and config.run.pictures:
                                self.draw(tracker)
                        with meter.saving():
                            self.save(scored)
                        if tracker:
                            tracker.flush()
                if scored and self._settled():
                    self._say_why_it_ends(done)
                    break
                if wish is Wish.STOP and not last:
                    raise StoppedEarly(done)
        finally:
            with ExitStack() as ends:  # the last comes first; each comes, whatever another meets
                if tracker:
                    ends.callback(tracker.close)
                ends.callback(self._drain, meter)
                ends.callback(self.loader.close)
        return self.progress

    def _settled(self) -> bool:
        """Whether `eval.patience` evaluations have come since the best one; the same on every rank."""
        patience, last, best = self.config.eval.patience, self.progress.last, self.progress.best
        since = last.step - best.step if last and best else 0
        return 0 < patience * self.config.eval.every <= since

    def _say_why_it_ends(self, done: int) -> None:
        if self.world.rank == 0 and done < self.config.optim.steps:
            log.info("no better mIoU in %d evaluations (eval.patience): ending early", self.config.eval.patience)

    def _drain(self, meter: Meter) -> None:
        """Waits for the last checkpoint; what ends a run meanwhile came later than an error of it."""
        with meter.saving():
            self.runtime.drain()
        if self.world.rank == 0 and meter.stood_still >= TOLD_AT_THE_END:
            log.info("training stood still for checkpoints for %.1f s in all", meter.stood_still)

    def _compile_network(self) -> None:
        """Compiles the method's networks for steps, on every rank or on none."""
        optim, unlabeled = self.config.optim, self.method.views.unlabeled
        images = (optim.batch_labeled + optim.batch_unlabeled * unlabeled) // (self.world.size * optim.accumulate)
        image = torch.zeros(images, 3, *self.config.data.crop, dtype=torch.uint8, device=self.device)
        networks = list(self.method.networks().values())
        if self.world.rank == 0:
            log.info("compiling the network (once, some minutes)")
        with autocast(self.device, self.config.run):
            problem = compile_networks(networks, self.method.trained()[0], image)
        if problem:
            log.warning("run.compile_network: %s; the network runs uncompiled, right but slower", problem)
        if self.world.gather(torch.tensor([bool(problem)], dtype=torch.uint8, device=self.device)).any():
            release_networks(networks)

    def _say(self, meter: Meter, done: int, record: dict[str, Any]) -> None:
        if self.world.rank == 0:
            log.info(meter.line(done, record), extra={"step": done, "brief": meter.brief(record)})

    def _say_what_comes(self) -> None:
        """Why the first step takes its time, for how long the unlabeled images wait, and what a GPU must hold."""
        if self.world.rank:
            return
        slow = self.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        if slow and self.config.run.precision == "bf16":
            log.warning("run.precision bf16: this GPU only emulates it, which is slow; --run.precision fp16 is faster")
        if self.dataset.info.bands and self.method.views.strong:
            log.info("strong views of bands: brightness, contrast and blur; saturation, hue and grey are of colours")
        alone = self.method.warmup
        if self.progress.step < alone:
            log.info("learning from labels alone until step %d", alone)
        if self.device.type == "cuda":
            from pipeline.training.memory import estimate, gpu_memory  # CPUs go without

            held = gpu_memory(self.device)
            log.info(estimate(self.config, len(self.dataset.info.classes), self.world.size, held))
        log.info("reading%s", "; the first step compiles the losses (once, about 40 s)" if self.compiled else "")

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
            **({"bands": info.bands, "ranges": info.ranges} if (info := self.dataset.info).bands else {}),
            "evaluation": self.dataset.info.evaluation,
            "protocol": self.config.data.protocol or self.dataset.info.protocol,
            "labeled": len(self.split.labeled),
            "unlabeled": len(self.split.unlabeled),
            "weights_digest": self.weights_digest,
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

    def _restore(self, uri: str) -> None:
        """Takes up the checkpoint at `uri`."""
        meta = checkpoint.read_meta(uri)
        if meta.data != self.data():
            raise UserError(f"{uri}: was trained on other images or another split; use --fresh or another --out")
        state = checkpoint.read_state(uri)
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and "scaler" in state:  # the precision may have been another one
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress.from_dict(state["progress"])
        self.weights_digest = str(meta.about.get("weights_digest", ""))
        if self.world.rank == 0:
            log.info("resuming from %s, step %d", uri, self.progress.step)

    def step(self, batch: Batch, index: int) -> Losses | None:
        """Forward, backward, clip, update: the step that everything else is about.

        Returns:
            The losses; None if the gradient was not finite and the update was left out, on every rank alike. With
            `optim.nonfinite stop` that is only so for a finite loss, whose scale in float16 was too large.
        """
        torch.backends.cudnn.benchmark = True  # training views have one size: a search for the fastest pays
        seed_step(self.config.seed, index, self.world.rank)
        step = Step(index, self.config.optim.steps, self.config.seed, self.world)
        with autocast(self.device, self.config.run):
            losses: Losses = self.model(batch, step)
        total = torch.stack(list(losses.terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self.progress.step = index + 1
        if update(self.method, self.optimizer, self.scaler, self.config.optim):
            self.method.after_step(step)
            return losses
        if self.config.optim.nonfinite == "stop" and self.world.sum(~total.isfinite()):
            return losses  # no scale mends a loss that is not finite: the run is to stop
        return None

    def evaluate(self, tracker: Tracker | None) -> None:
        """Scores every network of the method on the validation set, shared among the ranks."""
        torch.backends.cudnn.benchmark = False  # validation images have many sizes, and each would be a search
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

    def draw(self, tracker: Tracker) -> None:
        """Draws what the method's result sees in some validation images; on rank 0 alone, and nothing is changed."""
        chosen = spread(self.dataset, self.config.run.pictures)
        samples = read_images(self.dataset, chosen, self.runtime.patience)
        step = Step(self.progress.step - 1, self.config.optim.steps, self.config.seed, World())
        looks = look(self.method, samples, self.dataset, self.config, step, PICTURE_SIDE)
        images = {each.id: drawn([each], self.dataset) for each in looks}
        tracker.show(self.progress.step, drawn(looks, self.dataset), images)

    def save(self, scored: bool) -> None:
        """Hands a checkpoint to the runtime; state is equal on all ranks, so rank 0 writes it.

        Raises:
            UserError: the one before it could not be written.
        """
        self.runtime.drain()  # one at a time: each holds a copy of the state
        score = self.progress.last.value if scored and self.progress.last else None
        self.runtime.report(self.progress.step, score, self._writer() if self.world.rank == 0 else None)

    def _writer(self) -> Callable[[Path], None]:
        """What writes the state of now into a folder, from any thread and while training goes on."""
        data, about, progress = self.data(), self.about(), replace(self.progress)
        parts = {"method": self.method.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.scaler.is_enabled():
            parts["scaler"] = self.scaler.state_dict()
        state = snapshot(parts)
        return lambda folder: checkpoint.save(folder, self.config, data, about, progress, **state())


def seed_step(seed: int, index: int, rank: int) -> None:
    """Seeds torch for one step (dropout), so that no generator state has to be saved."""
    digest = hashlib.blake2b(f"{seed}/{index}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
