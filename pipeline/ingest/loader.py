"""The paired batch: read and decoded a few steps ahead of the training loop."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.batch import Batch, Views, padding_of
from pipeline.config.methods import ViewSpec
from pipeline.config.schema import Config
from pipeline.datasets.prepared.dataset import Dataset
from pipeline.datasets.prepared.splits import Split
from pipeline.errors import UserError
from pipeline.ingest.augment import Outcome, ViewRecipe, view_bytes
from pipeline.ingest.decode import Buffers, ClusterDecoder, Decoded, Decoder, ThreadDecoder
from pipeline.ingest.groups import LABELED, balanced, select_images
from pipeline.ingest.order import LanePlan, Mixture, Source, generator, open_sources, owned_lanes
from pipeline.ingest.read import Reader, Sample, SampleStream, held_reader, is_held
from pipeline.patience import Patience

log = logging.getLogger(__name__)
MAX_SKIPPED_SHARE = 0.01
"""A larger share of images that cannot be decoded stops the run."""
_TOLERATED = 10
"""So many are no reason to stop, unless there are no others."""


@dataclass
class IngestStats:
    """Sums since the start of this attempt. Only the trainer's thread writes them."""

    samples: int = 0
    skipped: int = 0
    """Images that could not be decoded, each counted once."""
    encoded: int = 0
    """Bytes of the samples, as stored."""
    decoding: float = 0.0
    """CPU seconds of decoding and making views, here or on other nodes."""
    retries: int = 0
    """Requests to the storage that were repeated, without those that its client repeats itself."""
    stalled: float = 0.0
    """Seconds that the training loop waited for batches."""

    def count(self, sample: Sample, outcome: Outcome) -> None:
        """Counts a sample that was decoded, or could not be."""
        self.samples += 1
        self.encoded += sum(len(part) for part in (sample.image, sample.mask, sample.label) if part is not None)
        self.decoding += outcome.seconds


@dataclass
class Origin:
    """A dataset or a pool, and what of it this worker could not use."""

    images: int
    """How many a run takes from it."""
    remedy: str
    """What to do about damage, for people."""
    seen: int = 0
    """Samples of it so far; an image counts again in each epoch."""
    damaged: set[str] = field(default_factory=set)
    """Ids. A damaged image comes again in each epoch, and is one image still."""

    def add(self, sample: Sample, problem: str) -> bool:
        """Counts a damaged sample; returns whether its image is a new one.

        Raises:
            UserError: more than 1 % of the images so far are damaged and more than ten, or all there are.
        """
        if sample.id in self.damaged:
            return False
        self.damaged.add(sample.id)
        log.warning("sample %s is damaged and left out: %s", sample.id, problem)
        # Neither samples alone (each epoch would allow more damage) nor ids (a run may see billions): within an epoch
        # every sample is another image, and later ones bring none.
        images, count = min(self.seen, self.images), len(self.damaged)
        if count > max(_TOLERATED, MAX_SKIPPED_SHARE * images) or count >= self.images:
            raise UserError(
                f"{count} of {images} images of {sample.root} are damaged, the last one {sample.id} ({problem}); "
                f"{self.remedy}"
            )
        return True


def origins(dataset: Dataset, split: Split, sources: Sequence[Source]) -> dict[str, Origin]:
    """Where the images of a run come from, by root."""
    again = "prepare it again with --overwrite --skip_bad, and train with --fresh"
    found = {dataset.root: Origin(len(split.labeled), again)}
    for source in sources:
        group = source.groups[0]
        linked = (
            f"mend or restore the files below {group.links} and train on; or {again.replace(' --', ' --copy --', 1)}"
        )
        origin = found.setdefault(group.root, Origin(0, linked if group.links else again))
        origin.images += source.images
    return found


PREFETCH_BYTES = 256 << 20
"""Memory for views made ahead of need. At least one step is made ahead."""
PREFETCH_STEPS = 8
"""Steps that are made ahead at most."""
CLOSE_SECONDS = 10.0
"""How long `close` waits for reading that is under way."""
Side = tuple[Sequence[Sample], Callable[[], Decoded]]
"""Samples, and the call that waits for their views."""


class Loader:
    """This rank's batches from step `start` on, endlessly; `close` stops it."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        split: Split,
        spec: ViewSpec,
        *,
        rank: int,
        world: int,
        start: int,
        threads: int,
        reader: Reader,
        patience: Patience | None = None,
        sources: Sequence[Source] | None = None,
        shared: Sequence[Any] = (),
        pinned: bool = False,
    ) -> None:
        """Takes up the labeled set if it is small; other reading, and decoding, begin with the first `next`.

        Args:
            config: batch sizes, crop and scale, seed, where to decode.
            dataset: where the samples are.
            split: which of them are labeled.
            spec: what the method needs.
            rank: this worker's.
            world: number of workers; divides both batch sizes.
            start: first step to deliver.
            threads: decoding threads.
            reader: how both sides are read.
            patience: with the storage; None: one of its own.
            sources: of the unlabeled images; None: opened as the config says.
            shared: labeled images that others have read, by `read.share`; empty: this worker reads them.
            pinned: whether batches lie in page-locked memory, for a GPU.
        """
        self.stats = IngestStats()
        self._patience = patience or Patience()
        padding = padding_of(dataset.info.mean)
        recipe = ViewRecipe(config.data, config.seed, spec.strong, len(dataset.info.bands), padding)
        self._decoder = _decoder(config, recipe, threads, Buffers(pinned=pinned))
        sources = (sources or open_sources(config, dataset, split)) if spec.unlabeled else ()
        self._origins = origins(dataset, split, sources)
        lanes, seed = config.optim.batch_labeled, config.seed
        balance, ids = config.data.balance, split.labeled
        times = balanced(dataset, ids, balance, generator(seed, "balance")) if balance else None
        images = LanePlan(select_images(dataset, ids, LABELED, times), lanes, seed, "labeled")
        held = is_held(dataset, split.labeled)
        held_or = held_reader(dataset, split.labeled, shared, reader, self._patience) if held else reader
        self._streams = [SampleStream(images, owned_lanes(lanes, rank, world), start, held_or, None, self._patience)]
        if spec.unlabeled:
            lanes, labels = config.optim.batch_unlabeled, config.data.pseudo_labels
            plan, owned = Mixture(sources, lanes, seed), owned_lanes(lanes, rank, world)
            self._streams.append(SampleStream(plan, owned, start, reader, labels, self._patience))
        self._ready: queue.Queue[list[Side] | BaseException] = queue.Queue(_steps_ahead(config, recipe, spec, world))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)

    def __iter__(self) -> Iterator[Batch]:
        """Batches on the CPU, in step order.

        Raises:
            UserError: too many damaged samples, a damaged shard, or a storage that stays away.
        """
        self._thread.start()
        while True:
            began = time.perf_counter()
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            views = [self._collect(*side) for side in item]
            self.stats.stalled += time.perf_counter() - began
            self.stats.retries = self._patience.retries
            yield Batch(views[0], views[1] if len(views) > 1 else None)

    def close(self) -> None:
        """Stops the threads and waits for them. A thread that outlives the interpreter would abort the process."""
        self._closed.set()
        self._decoder.close()
        if self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()  # a producer that waits for room goes on, and sees that it is over
            self._thread.join(CLOSE_SECONDS)

    def _produce(self) -> None:
        try:
            streams = [iter(stream) for stream in self._streams]
            while not self._closed.is_set():
                sides = [next(stream) for stream in streams]
                self._put([(samples, self._decoder.submit(samples)) for samples in sides])
        except BaseException as error:  # handed to the consumer: a thread that dies silently would hang the run
            self._put(error)

    def _put(self, item: list[Side] | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.5)
                return
            except queue.Full:
                continue

    def _collect(self, samples: Sequence[Sample], wait: Callable[[], Decoded]) -> Views:
        views, outcomes = wait()
        for sample, outcome in zip(samples, outcomes, strict=True):
            self.stats.count(sample, outcome)
            if not sample.left_out:
                origin = self._origins[sample.root]
                origin.seen += 1
                if outcome.problem:
                    self.stats.skipped += origin.add(sample, outcome.problem)
        return views


def _decoder(config: Config, recipe: ViewRecipe, threads: int, buffers: Buffers) -> Decoder:
    if config.run.decode == "cluster":
        return ClusterDecoder(recipe, buffers)
    return ThreadDecoder(recipe, threads, buffers)


def _steps_ahead(config: Config, recipe: ViewRecipe, spec: ViewSpec, world: int) -> int:
    """How many steps fit into the memory for views made ahead."""
    step = config.optim.batch_labeled * view_bytes(recipe, classes=True)
    if spec.unlabeled:
        step += config.optim.batch_unlabeled * view_bytes(recipe, classes=spec.pseudo, strong=spec.strong)
    return max(1, min(PREFETCH_STEPS, PREFETCH_BYTES * world // step))
