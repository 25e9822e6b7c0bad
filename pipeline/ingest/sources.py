"""Where a step's samples come from: the labeled set in memory, the unlabeled set as a stream."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.datasets.format import Dataset, read_group
from pipeline.ingest.plan import Group, LanePlan, select_groups
from pipeline.ingest.randomness import Permutation
from pipeline.ingest.readers import Reader


@dataclass(frozen=True)
class Sample:
    """One encoded sample, and the epoch that its augmentation is keyed by."""

    epoch: int
    id: str
    image: memoryview | bytes
    mask: memoryview | bytes | None
    """The truth, on the labeled side alone."""
    label: memoryview | bytes | None = None
    """What an earlier network saw, where pseudo-labels are used."""


class LabeledSet:
    """The labeled samples: encoded bytes in memory, drawn by an endless seeded permutation.

    Every worker holds the whole set: any worker may need any sample, so that the sequence of global batches does not
    depend on how many workers there are.
    """

    def __init__(self, dataset: Dataset, ids: Sequence[str], seed: int) -> None:
        """Reads the row groups that hold `ids`; keeps these rows alone."""
        self.retries = 0
        """How often the storage had to be asked again."""
        self._seed = seed
        self._ids = sorted(ids)
        self._bytes: dict[str, tuple[bytes, bytes]] = {}
        with ThreadPoolExecutor(4) as pool:
            for rows, retries in pool.map(_counted, select_groups(dataset, ids)):
                self._bytes.update(rows)
                self.retries += retries

    def samples(self, positions: Sequence[int], step: int, global_batch: int) -> list[Sample]:
        """The samples at `positions` of the global batch of `step`."""
        epochs, places = np.divmod(np.asarray(positions) + step * global_batch, len(self._ids))
        found = []
        for epoch, place in zip(epochs.tolist(), places, strict=True):
            order = Permutation(len(self._ids), self._seed, "labeled", epoch)
            name = self._ids[int(order(place[None])[0])]
            image, mask = self._bytes[name]
            found.append(Sample(epoch, name, memoryview(image), memoryview(mask)))
        return found


def _counted(group: Group) -> tuple[list[tuple[str, tuple[bytes, bytes]]], int]:
    before = storage.retries()
    return _labeled_rows(group), storage.retries() - before


def _labeled_rows(group: Group) -> list[tuple[str, tuple[bytes, bytes]]]:
    table = read_group(group.root, group.shard, group.row_group, ["id", "image", "mask"]).take(list(group.rows))
    columns = (table[name].to_pylist() for name in ("id", "image", "mask"))
    return [(name, (image, mask)) for name, image, mask in zip(*columns, strict=True)]


class UnlabeledStream:
    """The samples of this rank's lanes, step by step, read ahead of need in the plan's order."""

    def __init__(
        self, plan: LanePlan, lanes: Sequence[int], start: int, reader: Reader, labels: str | None = None
    ) -> None:
        self.retries = 0
        """How often the storage had to be asked again."""
        self._lanes = lanes
        self._units = reader(plan.units(lanes, start), labels)
        self._queues: dict[int, deque[Sample]] = {lane: deque() for lane in lanes}

    def __iter__(self) -> Iterator[list[Sample]]:
        """Endless; each item holds one sample per lane."""
        while True:
            yield [self._next(lane) for lane in self._lanes]

    def _next(self, lane: int) -> Sample:
        queue = self._queues[lane]
        while not queue:  # units come in order of need: at most the other lanes' next ones are queued on the way
            unit, table = next(self._units)
            self.retries += sum(table["retries"].to_pylist())
            images = table["image"].combine_chunks()
            labels = table["label"].combine_chunks() if "label" in table.column_names else None
            self._queues[unit.lane].extend(
                Sample(
                    unit.epoch,
                    unit.group.ids[row],
                    _view(images, row),
                    None,
                    None if labels is None else _view(labels, row),
                )
                for row in unit.order
            )
        return queue.popleft()


def _view(column: pa.Array, row: int) -> memoryview:
    """The bytes of one image, where they lie (no copy out of the object store)."""
    return memoryview(column[row].as_buffer())
