import dataclasses
import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline import storage
from pipeline.config.methods import ViewSpec
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.ingest import loader as loaders
from pipeline.ingest.augment import ViewRecipe
from pipeline.ingest.decode import Buffers, ThreadDecoder
from pipeline.ingest.groups import LABELED, select_groups, select_images
from pipeline.ingest.order import LanePlan, Unit, owned_lanes
from pipeline.ingest.read import SampleStream, read_inline
from pipeline.patience import Patience
from tests.processes import wait_for
from tests.unit.ingest.loading import both_views, configured, loader_of, on_unlabeled, producing, same, take


def test_a_batch_is_what_it_says(shapes):
    config = configured(shapes)
    dataset = open_dataset(shapes)
    split = load_split(dataset, config.split)
    for batch in take(config, 30):
        labeled, unlabeled = both_views(batch)
        for side, count, ids in ((labeled, 4, split.labeled), (unlabeled, 6, split.unlabeled)):
            assert side.image.shape == (count, 3, 40, 32)
            assert side.image.dtype == torch.uint8
            assert side.valid.shape == (count, 40, 32)
            assert side.valid.dtype == torch.bool
            assert len(side.ids) == count
            assert set(side.ids) <= set(ids)
        assert labeled.mask is not None
        assert labeled.mask.dtype == torch.int64
        assert torch.equal(labeled.mask == 255, ~labeled.valid)  # the shapes ignore nothing themselves
        assert (labeled.mask[labeled.valid] < 6).all()


def test_no_unlabeled_mask_can_be_reached(shapes, monkeypatch):
    """The stream asks the storage for no byte of any mask, and its samples hold none."""
    asked: list[tuple[str, int, int]] = []
    original = storage.read_range

    def watched(uri: str, offset: int, size: int) -> bytes:
        asked.append((uri, offset, offset + size))
        return original(uri, offset, size)

    monkeypatch.setattr(storage, "read_range", watched)
    dataset = open_dataset(shapes)
    split = load_split(dataset, "1_4")
    plan = LanePlan(select_groups(dataset, split.unlabeled), 6, 0)
    stream = SampleStream(plan, range(6), 0, read_inline, None, Patience())
    for samples in itertools.islice(stream, 20):
        assert all(sample.mask is None for sample in samples)
    assert asked
    for row in dataset.index.to_pylist():
        uri, begin, end = f"{shapes}/{row['shard']}", row["mask_at"], row["mask_at"] + row["mask_bytes"]
        assert not any(uri == other and begin < last and first < end for other, first, last in asked)
    assert all(both_views(batch)[1].mask is None for batch in take(configured(shapes), 2))


def test_a_method_without_unlabeled_images_reads_none(shapes):
    def labeled(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
        for unit, table in read_inline(units, labels, patience):
            assert unit.group.columns == LABELED
            yield unit, table

    batches = take(configured(shapes), 3, spec=ViewSpec(unlabeled=False), reader=labeled)
    assert [batch.unlabeled for batch in batches] == [None] * 3


# ---- the order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("start", [0, 7, 61])
def test_batches_do_not_depend_on_workers_threads_or_interruptions(shapes, world, start):
    """61 is past the first epoch of both sides."""
    config = configured(shapes)
    whole = take(config, start + 4)[start:]
    for rank in range(world):
        part = take(config, 4, rank=rank, world=world, start=start, threads=3)
        for one, two in zip(whole, part, strict=True):
            for all_of, mine in zip(both_views(one), both_views(two), strict=True):
                share = len(all_of.ids) // world
                places = slice(rank * share, (rank + 1) * share)
                assert mine.ids == all_of.ids[places]
                assert torch.equal(mine.image, all_of.image[places])
                assert torch.equal(mine.valid, all_of.valid[places])


def test_every_image_once_per_epoch(shapes):
    config = configured(shapes)
    split = load_split(open_dataset(shapes), "1_4")
    steps = len(split.labeled) // 4
    assert len(split.labeled) % 4 == 0
    labeled = [both_views(batch)[0].ids for batch in take(config, 2 * steps, spec=ViewSpec(unlabeled=True))]
    epochs = [sorted(itertools.chain(*labeled[:steps])), sorted(itertools.chain(*labeled[steps:]))]
    assert epochs == [sorted(split.labeled)] * 2
    assert labeled[:steps] != labeled[steps:]


def test_views_change_with_epoch_and_seed(shapes):
    config = configured(shapes)
    dataset = open_dataset(shapes)
    ids = load_split(dataset, "1_4").labeled[:2]
    plan = LanePlan(select_images(dataset, ids, LABELED), 2, 0, "labeled")
    epochs = list(itertools.islice(SampleStream(plan, range(2), 0, read_inline, None, Patience()), 4))
    assert [sorted(sample.id for sample in samples) for samples in epochs] == [sorted(ids)] * 4
    assert [{sample.epoch for sample in samples} for samples in epochs] == [{0}, {1}, {2}, {3}]
    assert same(take(config, 3), take(config, 3))
    assert not same(take(config, 3), take(dataclasses.replace(config, seed=1), 3))
    decoder = ThreadDecoder(ViewRecipe(config.data, config.seed, strong=0), 1, Buffers(pinned=False))
    views = [decoder.submit(sorted(each, key=lambda sample: sample.id))()[0] for each in epochs[:2]]
    decoder.close()
    assert views[0].ids == views[1].ids
    assert not torch.equal(views[0].image, views[1].image)


# ---- strong views ---------------------------------------------------------------------------------------------


def test_steps_are_made_ahead_up_to_a_number_of_bytes(shapes, monkeypatch):
    config = configured(shapes)
    step = (4 * 12 + 6 * 4) * 40 * 32
    made = []
    submit = loaders.ThreadDecoder.submit

    def counted(self: loaders.ThreadDecoder, samples: Any) -> Any:
        made.append(len(samples))
        return submit(self, samples)

    monkeypatch.setattr(loaders.ThreadDecoder, "submit", counted)
    for size, steps in ((1, 1), (3 * step, 3), (1 << 40, loaders.PREFETCH_STEPS)):
        monkeypatch.setattr(loaders, "PREFETCH_BYTES", size)
        made.clear()
        loader = loader_of(config)
        next(iter(loader))
        wait_for("all that has room", lambda steps=steps: len(made) >= 2 * (steps + 2))
        time.sleep(0.1)  # one more would come now
        assert len(made) == 2 * (steps + 2)  # one handed over, one that waits for room
        loader.close()


def test_batches_that_are_kept_stay_what_they_were(shapes):
    """Memory is used again, but not that of a batch which somebody still has."""
    loader = loader_of(configured(shapes), threads=2)
    kept = list(itertools.islice(loader, 25))
    loader.close()
    assert same(kept, take(configured(shapes), 25))
    loader = loader_of(configured(shapes))
    places = {batch.labeled.image.data_ptr() for batch in itertools.islice(loader, 40)}
    loader.close()
    assert len(places) <= loaders.PREFETCH_STEPS + 4


# ---- ends -----------------------------------------------------------------------------------------------------


class _Trouble(Exception):
    pass


def test_trouble_of_the_reader_reaches_the_training_loop(shapes):
    def read(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
        for number, item in enumerate(read_inline(units, labels, patience)):
            if number == 20:
                raise _Trouble
            yield item

    loader = loader_of(configured(shapes), reader=on_unlabeled(read))
    with pytest.raises(_Trouble):
        list(itertools.islice(loader, 1000))
    loader.close()
    assert not producing()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_close_ends_the_threads(shapes, taken):
    """One that still decodes while the interpreter ends aborts the process."""
    loader = loader_of(configured(shapes))
    list(itertools.islice(loader, taken))
    time.sleep(0.1 if taken == 5 else 0)  # time to fill the queue: a producer that waits for room ends as well
    loader.close()
    assert not producing()
    loader.close()


def test_close_does_not_wait_for_storage_that_hangs(shapes, monkeypatch):
    monkeypatch.setattr(loaders, "CLOSE_SECONDS", 0.2)
    reached, hold = threading.Event(), threading.Event()

    def hanging(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
        for number, item in enumerate(read_inline(units, labels, patience)):
            if number == 6:  # one more than the first step takes
                reached.set()
                hold.wait(60)
            yield item

    loader = loader_of(configured(shapes), reader=on_unlabeled(hanging))
    next(iter(loader))
    assert reached.wait(60)
    loader.close()
    (thread,) = producing()
    hold.set()
    thread.join(60)
    assert not producing()


def test_waiting_for_batches_is_measured(shapes):
    loader = loader_of(configured(shapes))
    next(iter(loader))
    loader.close()
    assert loader.stats.stalled > 0
    assert loader.stats.samples >= 10
    assert loader.stats.skipped == 0
    assert loader.stats.encoded > 100 * loader.stats.samples
    assert loader.stats.decoding > 0


def test_asking_the_storage_again_is_counted(shapes, monkeypatch):
    """Every other try fails, on both sides."""
    resolve, tries, failed = storage.resolve, itertools.count(), []

    def flaky(uri: str) -> Any:
        if "/shards/" in uri and next(tries) % 2 == 0:
            failed.append(uri)
            raise ConnectionResetError("by peer")
        return resolve(uri)

    monkeypatch.setattr(storage, "resolve", flaky)
    monkeypatch.setattr("pipeline.patience.time.sleep", lambda seconds: None)
    loader = loader_of(configured(shapes))
    labeled = len(failed)  # the constructor has read them
    list(itertools.islice(loader, 30))
    loader.close()
    assert 2 < labeled < loader.stats.retries <= len(failed)


def test_lanes_must_divide(shapes):
    with pytest.raises(ValueError, match="4 lanes over 3 ranks"):
        loader_of(configured(shapes), world=3)
    assert owned_lanes(4, 1, 2) == range(2, 4)


# ---- pseudo-labels --------------------------------------------------------------------------------------------
