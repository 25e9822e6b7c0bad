import dataclasses
import itertools
import logging
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.batch import Batch, Views, ViewSpec
from pipeline.cli import resolve
from pipeline.config import Config
from pipeline.datasets import format as formats
from pipeline.datasets.decode import decode_mask
from pipeline.datasets.format import open_dataset
from pipeline.datasets.images import encode_png
from pipeline.datasets.splits import load_split
from pipeline.errors import UserError
from pipeline.ingest import loader as loaders
from pipeline.ingest import readers, sources
from pipeline.ingest.loader import Loader
from pipeline.ingest.plan import LanePlan, Unit, owned_lanes, select_groups
from pipeline.ingest.readers import Reader, read_inline
from pipeline.ingest.sources import LabeledSet, UnlabeledStream
from pipeline.methods import OPTIONS

DAMAGED = b"this is no picture"


def _config(root: str, **data: Any) -> Config:
    return resolve(
        {
            "split": "1_4",
            "data": {"root": root, "crop": [40, 32], **data},
            "optim": {"batch_labeled": 4, "batch_unlabeled": 6},
        },
        OPTIONS,
    )


def _loader(config: Config, rank: int = 0, world: int = 1, start: int = 0, **options: Any) -> Loader:
    dataset = open_dataset(str(config.data.root))
    split = load_split(dataset, config.split, config.data.protocol)
    settings = {"threads": 1, "reader": read_inline, "spec": ViewSpec(unlabeled=True), **options}
    spec = settings.pop("spec")
    return Loader(config, dataset, split, spec, rank=rank, world=world, start=start, **settings)


def _take(config: Config, count: int, **options: Any) -> list[Batch]:
    loader = _loader(config, **options)
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def _equal(one: Views | None, two: Views | None) -> bool:
    if one is None or two is None:
        return one is two
    masks = one.mask is two.mask if one.mask is None or two.mask is None else torch.equal(one.mask, two.mask)
    return one.ids == two.ids and torch.equal(one.image, two.image) and torch.equal(one.valid, two.valid) and masks


def _same(one: list[Batch], two: list[Batch]) -> bool:
    return len(one) == len(two) and all(
        _equal(a.labeled, b.labeled) and _equal(a.unlabeled, b.unlabeled) for a, b in zip(one, two, strict=True)
    )


def _views(batch: Batch) -> tuple[Views, Views]:
    assert batch.unlabeled is not None
    return batch.labeled, batch.unlabeled


# ---- what a batch is ------------------------------------------------------------------------------------------


def test_a_batch_is_what_it_says(shapes):
    config = _config(shapes)
    dataset = open_dataset(shapes)
    split = load_split(dataset, config.split)
    for batch in _take(config, 30):
        labeled, unlabeled = _views(batch)
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
    """The stream asks the storage for id and image alone, and its samples hold no mask."""
    asked: list[list[str]] = []
    read = readers.read_group

    def watched(root: str, shard: str, row_group: int, columns: list[str]) -> pa.Table:
        asked.append(columns)
        return read(root, shard, row_group, columns)

    monkeypatch.setattr(readers, "read_group", watched)
    dataset = open_dataset(shapes)
    split = load_split(dataset, "1_4")
    plan = LanePlan(select_groups(dataset, split.unlabeled), 6, 0)
    stream = UnlabeledStream(plan, range(6), 0, read_inline)
    for samples in itertools.islice(stream, 20):
        assert all(sample.mask is None for sample in samples)
    assert asked
    assert all(columns == ["id", "image"] for columns in asked)
    assert all(_views(batch)[1].mask is None for batch in _take(_config(shapes), 2))


def test_a_method_without_unlabeled_images_reads_none(shapes):
    def unread(units: Iterable[Unit], labels: str | None = None) -> Iterator[tuple[Unit, pa.Table]]:
        raise AssertionError("nobody asked for this")

    batches = _take(_config(shapes), 3, spec=ViewSpec(unlabeled=False), reader=unread)
    assert [batch.unlabeled for batch in batches] == [None] * 3


# ---- the order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("start", [0, 7, 61])
def test_batches_do_not_depend_on_workers_threads_or_interruptions(shapes, world, start):
    """61 is past the first epoch of both sides."""
    config = _config(shapes)
    whole = _take(config, start + 4)[start:]
    for rank in range(world):
        part = _take(config, 4, rank=rank, world=world, start=start, threads=3)
        for one, two in zip(whole, part, strict=True):
            for all_of, mine in zip(_views(one), _views(two), strict=True):
                share = len(all_of.ids) // world
                places = slice(rank * share, (rank + 1) * share)
                assert mine.ids == all_of.ids[places]
                assert torch.equal(mine.image, all_of.image[places])
                assert torch.equal(mine.valid, all_of.valid[places])


def test_every_image_once_per_epoch(shapes):
    config = _config(shapes)
    split = load_split(open_dataset(shapes), "1_4")
    steps = len(split.labeled) // 4
    assert len(split.labeled) % 4 == 0
    labeled = [_views(batch)[0].ids for batch in _take(config, 2 * steps, spec=ViewSpec(unlabeled=True))]
    epochs = [sorted(itertools.chain(*labeled[:steps])), sorted(itertools.chain(*labeled[steps:]))]
    assert epochs == [sorted(split.labeled)] * 2
    assert labeled[:steps] != labeled[steps:]


def test_views_change_with_epoch_and_seed(shapes):
    config = _config(shapes)
    dataset = open_dataset(shapes)
    ids = load_split(dataset, "1_4").labeled[:2]
    few = LabeledSet(dataset, ids, 0)
    epochs = [few.samples([0, 1], step, 2) for step in range(4)]
    assert [sorted(sample.id for sample in samples) for samples in epochs] == [sorted(ids)] * 4
    assert [{sample.epoch for sample in samples} for samples in epochs] == [{0}, {1}, {2}, {3}]
    assert _same(_take(config, 3), _take(config, 3))
    assert not _same(_take(config, 3), _take(dataclasses.replace(config, seed=1), 3))
    loader = _loader(config)
    views = [loader._decoder.submit(sorted(each, key=lambda sample: sample.id))()[0] for each in epochs[:2]]
    loader.close()
    assert views[0].ids == views[1].ids
    assert not torch.equal(views[0].image, views[1].image)


# ---- strong views ---------------------------------------------------------------------------------------------

STRONG = ViewSpec(unlabeled=True, strong=2)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("start", [0, 7])
def test_strong_views_do_not_depend_on_workers_threads_or_interruptions(shapes, world, start):
    config = _config(shapes)
    whole = _take(config, start + 2, spec=STRONG)[start:]
    for rank in range(world):
        part = _take(config, 2, spec=STRONG, rank=rank, world=world, start=start, threads=3)
        for one, two in zip(whole, part, strict=True):
            share = 6 // world
            for all_of, mine in zip(_views(one)[1].strong, _views(two)[1].strong, strict=True):
                assert torch.equal(mine, all_of[rank * share : (rank + 1) * share])


def test_strong_views_differ_from_the_weak_one_in_colour_alone(shapes):
    for batch in _take(_config(shapes, scale=[0.3, 0.8]), 5, spec=STRONG):
        labeled, unlabeled = _views(batch)
        assert labeled.strong == ()
        one, two = unlabeled.strong
        for view in (one, two):
            assert view.shape == unlabeled.image.shape
            assert view.dtype == torch.uint8
            assert view.is_contiguous()
            padding = ~unlabeled.valid[:, None].expand_as(view)
            assert padding.any()
            assert torch.equal(view[padding], unlabeled.image[padding])
            assert not torch.equal(view, unlabeled.image)
        assert not torch.equal(one, two)


def test_who_asks_for_no_strong_view_gets_the_very_same_batches(shapes):
    config = _config(shapes)
    plain, strong = _take(config, 4), _take(config, 4, spec=STRONG)
    assert _same(plain, strong)
    assert all(_views(batch)[1].strong == () for batch in plain)


def test_strong_views_move_with_the_batch(shapes):
    unlabeled = _views(_take(_config(shapes), 1, spec=STRONG)[0].to(torch.device("meta")))[1]
    assert [view.device.type for view in unlabeled.strong] == ["meta"] * 2


# ---- damage ---------------------------------------------------------------------------------------------------


def _spoiling(ids: set[str]) -> Reader:
    """The inline reader, with the images of `ids` damaged."""

    def read(units: Iterable[Unit], labels: str | None = None) -> Iterator[tuple[Unit, pa.Table]]:
        for unit, table in read_inline(units, labels):
            rows = [{**row, "image": DAMAGED} if row["id"] in ids else row for row in table.to_pylist()]
            yield unit, pa.Table.from_pylist(rows, table.schema)

    return read


def test_a_damaged_image_counts_as_padding_and_is_named(shapes, caplog):
    config = _config(shapes)
    ids = [name for batch in _take(config, 5) for name in _views(batch)[1].ids]
    with caplog.at_level(logging.WARNING, "pipeline"):
        loader = _loader(config, reader=_spoiling({ids[3]}), spec=STRONG)
        batches = list(itertools.islice(loader, 5))
        loader.close()
    clean = _take(config, 5)
    for one, two in zip(batches, clean, strict=True):
        assert _equal(one.labeled, two.labeled)
        mine, other = _views(one)[1], _views(two)[1]
        for place, name in enumerate(mine.ids):
            if name == ids[3]:
                assert not mine.valid[place].any()
                assert all(torch.equal(view[place], mine.image[place]) for view in mine.strong)
                assert torch.equal(mine.image[place].flatten(1).unique(dim=1).flatten().sort().values,
                                   torch.tensor([104, 116, 124], dtype=torch.uint8))  # fmt: skip
            else:
                assert torch.equal(mine.image[place], other.image[place])
    assert loader.stats.skipped >= 1
    assert f"sample {ids[3]} is damaged and left out: not a JPEG or PNG" in caplog.text


@pytest.mark.parametrize("what", ["image", "mask", "size"])
def test_a_damaged_labeled_sample_has_no_label(shapes, monkeypatch, what):
    rows_of = sources._labeled_rows
    first = _take(_config(shapes), 1)[0].labeled.ids[0]

    small = encode_png(np.zeros((5, 5), np.uint8))

    def spoiled(group: Any) -> list[tuple[str, tuple[bytes, bytes]]]:
        found = []
        for name, (image, mask) in rows_of(group):
            pair = {"image": (DAMAGED, mask), "mask": (image, mask[:60]), "size": (image, small)}[what]
            found.append((name, pair if name == first else (image, mask)))
        return found

    monkeypatch.setattr(sources, "_labeled_rows", spoiled)
    labeled = _take(_config(shapes), 1)[0].labeled
    assert labeled.mask is not None
    assert (labeled.mask[0] == 255).all()
    assert not labeled.valid[0].any()
    assert labeled.valid[1:].any()


def test_too_many_damaged_samples_end_the_run(shapes):
    config = _config(shapes)
    everything = set(open_dataset(shapes).index["id"].to_pylist())
    loader = _loader(config, reader=_spoiling(everything))
    with pytest.raises(UserError, match=r"11 of \d+ samples are damaged, the last one shape_\d+ \(not a JPEG or PNG\)"):
        list(itertools.islice(loader, 20))
    loader.close()


def test_removed_images_are_skipped(shapes, caplog):
    """A pool may lose an image after it was listed: its bytes are empty then."""

    def read(units: Iterable[Unit], labels: str | None = None) -> Iterator[tuple[Unit, pa.Table]]:
        for unit, table in read_inline(units, labels):
            rows = [{**row, "image": b""} for row in table.to_pylist()[:1]] + table.to_pylist()[1:]
            yield unit, pa.Table.from_pylist(rows, table.schema)

    with caplog.at_level(logging.WARNING, "pipeline"):
        loader = _loader(_config(shapes), reader=read)
        batches = list(itertools.islice(loader, 3))
        loader.close()
    gone = [not valid.any() for batch in batches for valid in _views(batch)[1].valid]
    assert loader.stats.skipped == sum(gone) > 0
    assert "no bytes" in caplog.text


# ---- looking ahead --------------------------------------------------------------------------------------------


def test_steps_are_made_ahead_up_to_a_number_of_bytes(shapes, monkeypatch):
    config = _config(shapes)
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
        loader = _loader(config)
        next(iter(loader))
        while not loader._ready.full() or len(made) < 2 * (steps + 2):
            loader._closed.wait(0.01)
        loader._closed.wait(0.1)
        assert len(made) == 2 * (steps + 2)  # one handed over, one that waits for room
        loader.close()


def test_batches_that_are_kept_stay_what_they_were(shapes):
    """Memory is used again, but not that of a batch which somebody still has."""
    loader = _loader(_config(shapes), threads=2)
    kept = list(itertools.islice(loader, 25))
    loader.close()
    assert _same(kept, _take(_config(shapes), 25))
    loader = _loader(_config(shapes))
    places = {batch.labeled.image.data_ptr() for batch in itertools.islice(loader, 40)}
    loader.close()
    assert len(places) <= loaders.PREFETCH_STEPS + 4


# ---- ends -----------------------------------------------------------------------------------------------------


class _Trouble(Exception):
    pass


def test_trouble_of_the_reader_reaches_the_training_loop(shapes):
    def read(units: Iterable[Unit], labels: str | None = None) -> Iterator[tuple[Unit, pa.Table]]:
        for number, item in enumerate(read_inline(units)):
            if number == 20:
                raise _Trouble
            yield item

    loader = _loader(_config(shapes), reader=read)
    with pytest.raises(_Trouble):
        list(itertools.islice(loader, 1000))
    loader.close()
    assert not loader._thread.is_alive()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_close_ends_the_threads(shapes, taken):
    """One that still decodes while the interpreter ends aborts the process."""
    loader = _loader(_config(shapes))
    list(itertools.islice(loader, taken))
    if taken:
        while not loader._ready.full():  # the producer waits for room, or soon will
            loader._closed.wait(0.01)
    loader.close()
    assert not loader._thread.is_alive()
    loader.close()


def test_close_does_not_wait_for_storage_that_hangs(shapes, monkeypatch):
    monkeypatch.setattr(loaders, "CLOSE_SECONDS", 0.2)
    reached, hold = threading.Event(), threading.Event()

    def hanging(units: Iterable[Unit], labels: str | None = None) -> Iterator[tuple[Unit, pa.Table]]:
        reached.set()
        hold.wait(60)
        yield from read_inline(units)

    loader = _loader(_config(shapes), reader=hanging)
    loader._thread.start()
    assert reached.wait(60)
    loader.close()
    assert loader._thread.is_alive()
    hold.set()
    loader._thread.join(60)
    assert not loader._thread.is_alive()


def test_waiting_for_batches_is_measured(shapes):
    loader = _loader(_config(shapes))
    next(iter(loader))
    loader.close()
    assert loader.stats.stalled > 0
    assert loader.stats.samples >= 10
    assert loader.stats.skipped == 0
    assert loader.stats.encoded > 100 * loader.stats.samples
    assert loader.stats.decoding > 0


def test_asking_the_storage_again_is_counted(shapes, monkeypatch):
    read, failed = formats._read_group, set()

    def flaky(uri: str, row_group: int, columns: list[str]) -> pa.Table:
        if (uri, row_group, *columns) not in failed:
            failed.add((uri, row_group, *columns))
            raise ConnectionResetError("by peer")
        return read(uri, row_group, columns)

    monkeypatch.setattr(formats, "_read_group", flaky)
    monkeypatch.setattr("pipeline.storage.time.sleep", lambda seconds: None)
    loader = _loader(_config(shapes))
    list(itertools.islice(loader, 30))
    loader.close()
    assert len(failed) > 5
    assert 0 < loader.stats.retries <= len(failed)
    labeled = [key for key in failed if key[-1] == "mask"]
    assert loader.stats.retries > len(labeled)


def test_lanes_must_divide(shapes):
    with pytest.raises(ValueError, match="4 lanes over 3 ranks"):
        _loader(_config(shapes), world=3)
    assert owned_lanes(4, 1, 2) == range(2, 4)


# ---- pseudo-labels --------------------------------------------------------------------------------------------


def test_pseudo_labels_belong_to_the_pixels_of_their_image(shapes, pseudo_labels):
    """They are the truth here: where the window shows the image, each pixel has the class that its colour says."""
    config = _config(shapes, pseudo_labels=pseudo_labels, scale=[1.0, 1.0])
    masks = {}
    for group in select_groups(open_dataset(shapes), load_split(open_dataset(shapes), "1_4").unlabeled):
        table = readers.read_group(shapes, group.shard, group.row_group, ["id", "mask"])
        masks.update(zip(*(table[name].to_pylist() for name in ("id", "mask")), strict=True))
    for batch in _take(config, 4, spec=STRONG):
        labeled, unlabeled = _views(batch)
        assert labeled.pseudo is None
        assert unlabeled.mask is None
        assert unlabeled.pseudo is not None
        assert torch.equal(unlabeled.pseudo == 255, ~unlabeled.valid)
        for name, label in zip(unlabeled.ids, unlabeled.pseudo, strict=True):
            stored = decode_mask(masks[name])
            crops = [
                side[y : y + 40, x : x + 32] for side in (stored, stored[:, ::-1]) for y in range(25) for x in range(33)
            ]
            assert any(np.array_equal(crop, label.numpy()) for crop in crops)


def test_pseudo_labels_change_nothing_else(shapes, pseudo_labels):
    plain, labeled = (_take(_config(shapes, **data), 4, spec=STRONG) for data in ({}, {"pseudo_labels": pseudo_labels}))
    assert _same(plain, labeled)


def test_pseudo_labels_of_another_split_are_refused(shapes, pseudo_labels):
    config = dataclasses.replace(_config(shapes, pseudo_labels=pseudo_labels), split="1_8")
    with pytest.raises(UserError, match="no pseudo-label of"):
        _take(config, 60)
