"""The paired batch: decoding and views in threads, a few steps ahead of the training loop."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.batch import Batch, Views, ViewSpec
from pipeline.config import Config
from pipeline.datasets.decode import DecodeError, decode_image, decode_mask
from pipeline.datasets.format import Dataset
from pipeline.datasets.splits import Split
from pipeline.errors import UserError
from pipeline.ingest import views
from pipeline.ingest.mixture import Mixture, Source, open_sources
from pipeline.ingest.photometric import fill_strong
from pipeline.ingest.plan import owned_lanes
from pipeline.ingest.randomness import generator
from pipeline.ingest.readers import Reader
from pipeline.ingest.sources import LabeledSet, Sample, UnlabeledStream

log = logging.getLogger(__name__)

PREFETCH = 3
"""Steps that are decoded ahead."""
CLOSE_SECONDS = 10.0
"""How long `close` waits for reading that is under way."""
MAX_DAMAGED_SHARE = 0.01
"""A larger share of damaged samples stops the run."""
_TOLERATED = 10


@dataclass
class IngestStats:
    """What the loader saw on this rank."""

    samples: int = 0
    damaged: int = 0
    stalled: float = 0.0
    """Seconds that the training loop waited for batches."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, sample: Sample, error: DecodeError | None) -> None:
        """Counts a sample; a damaged one is named, and too many of them end the run."""
        with self._lock:
            self.samples += 1
            if error is None:
                return
            self.damaged += 1
            log.warning("sample %s is damaged and left out: %s", sample.id, error)
            if self.damaged > max(_TOLERATED, MAX_DAMAGED_SHARE * self.samples):
                raise UserError(
                    f"{self.damaged} of {self.samples} samples are damaged, the last one {sample.id} ({error})"
                )


class Loader:
    """This rank's batches from step `start` on; iterating never ends, `close` does."""

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
        sources: Sequence[Source] | None = None,
    ) -> None:
        """Loads the labeled set; reading and decoding begin with the first `next`.

        Args:
            config: batch sizes, crop and scale, seed.
            dataset: where the samples are.
            split: which of them are labeled.
            spec: what the method needs.
            rank: this worker's.
            world: number of workers; divides both batch sizes.
            start: first step to deliver.
            threads: decoding threads.
            reader: how the unlabeled side is read.
            sources: of the unlabeled images; None: opened as the config says.
        """
        self.stats = IngestStats()
        self._config, self._start = config, start
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._labeled = LabeledSet(dataset, split.labeled, config.seed)
        self._labeled_lanes = owned_lanes(config.optim.batch_labeled, rank, world)
        self._strong = spec.strong
        self._unlabeled: UnlabeledStream | None = None
        if spec.unlabeled:
            lanes = config.optim.batch_unlabeled
            plan = Mixture(sources or open_sources(config, dataset, split), lanes, config.seed)
            self._unlabeled = UnlabeledStream(plan, owned_lanes(lanes, rank, world), start, reader)
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH)
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
            self.stats.stalled += time.perf_counter() - began
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stops the threads and waits for them: one that still runs while the interpreter ends aborts the process."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()  # a producer that waits for room goes on, and sees that it is over
            self._thread.join(CLOSE_SECONDS)

    def _produce(self) -> None:
        try:
            unlabeled = iter(self._unlabeled) if self._unlabeled else None
            step = self._start
            while not self._closed.is_set():
                ours = self._labeled.samples(self._labeled_lanes, step, self._config.optim.batch_labeled)
                theirs = next(unlabeled) if unlabeled else None
                self._put(Batch(self._views(ours), self._views(theirs) if theirs else None))
                step += 1
        except BaseException as error:  # handed to the consumer: a thread that dies silently would hang the run
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.5)
                return
            except queue.Full:
                continue

    def _views(self, samples: Sequence[Sample]) -> Views:
        height, width = self._config.data.crop
        labeled = samples[0].mask is not None
        image = np.empty((len(samples), 3, height, width), np.uint8)
        mask = np.empty((len(samples), height, width), np.uint8)
        valid = np.empty((len(samples), height, width), bool)
        strong = np.empty((0 if labeled else self._strong, *image.shape), np.uint8)
        list(self._pool.map(self._fill, samples, image, mask, valid, strong.swapaxes(0, 1)))
        return Views(
            torch.from_numpy(image),
            torch.from_numpy(mask).long() if labeled else None,
            torch.from_numpy(valid),
            tuple(sample.id for sample in samples),
            tuple(map(torch.from_numpy, strong)),
        )

    def _fill(self, sample: Sample, image: np.ndarray, mask: np.ndarray, valid: np.ndarray, strong: np.ndarray) -> None:
        """Decodes one sample into its slots; a damaged one leaves views of which no pixel counts."""
        try:
            pixels = decode_image(sample.image)
            classes = None if sample.mask is None else decode_mask(sample.mask)
            if classes is not None and classes.shape != pixels.shape[:2]:
                raise DecodeError("image and mask have different sizes")
        except DecodeError as error:
            image[:], mask[:], valid[:] = views.MEAN_COLOUR[:, None, None], views.IGNORE, False
            strong[:] = image
            self.stats.count(sample, error)
            return
        side = "unlabeled" if classes is None else "labeled"
        rng = generator(self._config.seed, sample.epoch, sample.id, side)
        window = views.draw_window(pixels.shape[0], pixels.shape[1], self._config.data, rng)
        views.cut_image(pixels, window, image)
        if classes is not None:
            views.cut_mask(classes, window, mask)
        valid[:] = views.valid_area(window, self._config.data.crop)
        area, hue = views.shown(window, self._config.data.crop[1]), self._config.data.hue
        for number, view in enumerate(strong):
            rng = generator(self._config.seed, sample.epoch, sample.id, "strong", number)
            fill_strong(image, area, hue, rng, view)
        self.stats.count(sample, None)
