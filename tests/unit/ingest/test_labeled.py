"""The labeled side: its order, and what a start reads and holds, of simulated indexes without images."""

import hashlib
import itertools
import zlib
from collections import Counter
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from pipeline.datasets.images import decode_mask
from pipeline.datasets.prepared import dataset as stored
from pipeline.datasets.prepared.dataset import INDEX_SCHEMA, OLDER_INDEX, Dataset, open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.ingest import read
from pipeline.ingest.groups import LABELED, balanced, select_groups, select_images
from pipeline.ingest.order import LanePlan, Permutation, generator
from pipeline.ingest.read import SampleStream, cut_items, held_reader, read_inline
from pipeline.patience import Patience
from tests.unit.ingest.loading import configured, same, take

GROUP, SHARD = 70, 490
"""Rows of a row group and of a shard, as those of VOC."""


@lru_cache
def simulated(count: int) -> Dataset:
    """Images of about 55 kB and masks of about 3 kB, of zeros, that lie as `prepare` lays them."""
    rng = np.random.default_rng(count)
    images, masks = rng.choice([30_000, 50_000, 80_000], count), rng.choice([1_000, 5_000], count)
    numbers = np.arange(count)
    groups = numbers // GROUP
    before = np.concatenate([[0], (images + masks + 64).cumsum()])  # with what lies between values
    begin = before[groups * GROUP] - before[groups * GROUP // SHARD * SHARD]

    def within(sizes: np.ndarray) -> np.ndarray:
        ends = np.concatenate([[0], (sizes + 4).cumsum()])
        return ends[numbers] - ends[groups * GROUP]

    whole = np.minimum((groups + 1) * GROUP, count)
    image_ends = np.concatenate([[0], (images + 4).cumsum()])
    columns = {
        "id": pa.array([f"{number:07d}" for number in np.random.default_rng(0).permutation(count)]),
        "subset": pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["train"]).cast(pa.string()),
        "shard": pa.array(np.char.add(np.char.add("shards/train-", (numbers // SHARD).astype(str)), ".parquet")),
        "row_group": groups % (SHARD // GROUP), "row": numbers % GROUP, "image_bytes": images, "mask_bytes": masks,
        "height": np.full(count, 375), "width": np.full(count, 500),
        "image_at": begin + within(images), "image_crc": _zeros_crc(images),
        "mask_at": begin + image_ends[whole] - image_ends[groups * GROUP] + 32 + within(masks),
        "mask_crc": _zeros_crc(masks),
        "classes": pa.FixedSizeListArray.from_arrays(np.zeros(count, np.uint8), 1).cast(pa.list_(pa.uint8())),
    }  # fmt: skip
    return Dataset("s3://data/simulated", cast("Any", None), pa.table(columns).cast(INDEX_SCHEMA).combine_chunks())


def _zeros_crc(sizes: np.ndarray) -> np.ndarray:
    known, which = np.unique(sizes, return_inverse=True)
    return np.array([zlib.crc32(bytes(int(size))) for size in known])[which]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each request that simulated shards are asked for."""
    sizes: list[int] = []

    def zeros(uri: str, offset: int, size: int) -> bytes:
        sizes.append(size)
        return bytes(size)

    monkeypatch.setattr(stored.storage, "read_range", zeros)
    return sizes


def labeled_plan(dataset: Dataset, ids: list[str], lanes: int = 16) -> LanePlan:
    return LanePlan(select_images(dataset, ids, LABELED), lanes, 0, "labeled")


# ---- order ----------------------------------------------------------------------------------------------------


def test_the_order_of_earlier_versions_stays():
    """A digest that the labeled set of version 0.1.0 made, also of later epochs and from a step on."""
    ids = [f"2007_{number:06d}" for number in range(92)]
    index = pa.table({name: ids if name == "id" else [0] * 92 for name in INDEX_SCHEMA.names[:-1]})
    index = index.set_column(2, "shard", pa.array(["s"] * 92))
    plan = labeled_plan(Dataset("root", cast("Any", None), index), ids)
    told = [
        [(unit.epoch, unit.group.ids[0]) for unit in itertools.islice(plan.units(range(16), start), 16 * (40 - start))]
        for start in (0, 17)
    ]
    assert hashlib.sha256(repr(told[0]).encode()).hexdigest()[:16] == "bc83894616dd8d03"
    assert told[1] == told[0][16 * 17 :]


@pytest.mark.parametrize(("count", "epochs"), [(92, 400), (100_000, 3)])
def test_each_epoch_mixes_the_images_anew(count, epochs):
    """Neither the order of the list nor that of the epoch before shows, and neighbours do not meet in a batch.

    Bounds are five standard deviations of what a random order gives.
    """
    places = np.array([Permutation(count, 0, "labeled", epoch)(np.arange(count)) for epoch in range(epochs)])
    assert all(len(np.unique(each)) == count for each in places[:3])
    bound = 5 / np.sqrt(count * (epochs - 1))
    centred = (places - (count - 1) / 2) / np.sqrt((count**2 - 1) / 12)
    assert abs((centred * np.linspace(-np.sqrt(3), np.sqrt(3), count)).mean()) < bound
    assert abs((centred[1:] * centred[:-1]).mean()) < bound
    batches = places[:, : count // 4 * 4].reshape(epochs, -1, 4)
    close = sum(
        int((np.abs(batches[:, :, one] - batches[:, :, two]) == 1).sum())
        for one, two in itertools.combinations(range(4), 2)
    )
    expected = epochs * batches.shape[1] * 6 * 2 / count
    assert abs(close - expected) < 5 * np.sqrt(expected)


def test_the_plan_serves_this_permutation():
    dataset = simulated(20_000)
    ids = sorted(dataset.index["id"].to_pylist()[::2])
    served = [unit.group.ids[0] for unit in itertools.islice(labeled_plan(dataset, ids).units(range(16), 600), 1_000)]
    epochs, places = np.divmod(np.arange(9_600, 10_600), len(ids))
    order = [Permutation(len(ids), 0, "labeled", epoch)(np.arange(len(ids))) for epoch in range(2)]
    assert served == [ids[order[epoch][place]] for epoch, place in zip(epochs, places, strict=True)]


# ---- balanced classes -----------------------------------------------------------------------------------------


def test_images_of_rare_classes_come_more_often():
    """Against the definition, written out image by image; a fraction is right on average."""
    ids = [f"{number:04d}" for number in range(1000)]
    shown = [[1] + [2] * (number % 10 == 0) + [7] * (number % 100 == 5) for number in range(1000)]
    shown[3] = []  # all of it is ignored
    dataset = Dataset("root", cast("Any", None), pa.table({"id": ids[::-1], "classes": shown[::-1]}))
    share = {1: 0.999, 2: 0.1, 7: 0.01}
    wanted = [max([1.0, *(np.sqrt(0.3 / share[name]) for name in names)]) for names in shown]
    drawn = np.array([balanced(dataset, ids, 0.3, np.random.default_rng(seed)) for seed in range(200)])
    assert (np.floor(wanted) <= drawn).all()
    assert (drawn <= np.ceil(wanted)).all()
    assert drawn[:, 0::10].mean() == pytest.approx(np.sqrt(3), abs=0.02)
    assert drawn[:, 5::100].mean() == pytest.approx(np.sqrt(30), abs=0.06)
    assert (drawn[:, 3] == 1).all()


def test_the_index_says_which_classes_a_mask_shows(shapes):
    dataset = open_dataset(shapes)
    ids = dataset.index["id"].to_pylist()[:40]
    masks = {
        name: np.unique(decode_mask(mask))
        for group in select_groups(dataset, ids, LABELED)
        for name, mask in zip(group.ids, read.read_rows(group, None, Patience())["mask"].to_pylist(), strict=True)
    }
    for name, found in zip(ids, dataset.index["classes"].to_pylist(), strict=False):
        assert found == [value for value in masks[name].tolist() if value != 255]


def test_of_a_split_alone_classes_are_counted():
    dataset = Dataset(
        "root", cast("Any", None), pa.table({"id": ["a", "b", "c", "d"], "classes": [[0], [1], [1], [1]]})
    )
    assert balanced(dataset, ["a", "b"], 1.0, np.random.default_rng(0)).tolist() in ([1, 1], [1, 2], [2, 1], [2, 2])
    assert balanced(dataset, ["a", "b"], 0.5, np.random.default_rng(0)).tolist() == [1, 1]


def test_balanced_batches(shapes):
    """Each turn of an epoch has a view of its own, and the sequence is one for any start and number of workers."""
    config = configured(shapes, balance=1.0)
    batches = take(config, 60)
    times = Counter(name for batch in batches for name in batch.labeled.ids)
    plain = Counter(name for batch in take(configured(shapes), 60) for name in batch.labeled.ids)
    assert max(plain.values()) - min(plain.values()) <= 1
    assert max(times.values()) > 1.4 * min(times.values())
    views = {batch.labeled.image[row].numpy().tobytes() for batch in batches for row in range(4)}
    assert len(views) == 60 * 4
    assert same(batches[23:27], take(config, 4, start=23))
    halves = [take(config, 8, rank=rank, world=2) for rank in range(2)]
    for whole, *parts in zip(batches[:8], *halves, strict=True):
        assert whole.labeled.ids == (*parts[0].labeled.ids, *parts[1].labeled.ids)


# ---- what a start reads and holds -----------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [16, 8, 4, 2, 1])
def test_a_held_split_reads_little_more_than_its_own_bytes(asked, parts):
    dataset = simulated(10_582)
    ids = generator("split").choice(dataset.index["id"].to_pylist(), 10_582 // parts, replace=False).tolist()
    assert read.is_held(dataset, ids)
    held_reader(dataset, ids, (), read_inline, Patience())
    own = select_images(dataset, ids, LABELED).size
    assert own <= sum(asked) <= 1.2 * own
    assert len(asked) <= 2 * len(ids)
    if parts == 1:
        assert len(asked) == -(-10_582 // GROUP)  # one request for each row group


def test_a_million_labeled_images_start_as_twenty_thousand_do(asked):
    """Requests before the first batch, and bytes that a task reads at a time; what grows is a number an image."""
    for count in (20_000, 1_000_000):
        dataset = simulated(count)
        ids = dataset.index["id"].to_pylist()
        assert not read.is_held(dataset, ids)
        plan = labeled_plan(dataset, ids)
        asked.clear()
        next(iter(SampleStream(plan, range(16), 0, read_inline, None, Patience())))
        assert len(asked) == 32  # image and mask
        assert sum(asked) < 16 * 90_000
        for item in itertools.islice(cut_items(plan.units(range(16), 0)), 3):
            assert sum(unit.group.size for unit in item) < read.ITEM_BYTES + 90_000
            assert len(item) <= read.ITEM_ROWS


# ---- one sequence, however it is read --------------------------------------------------------------------------


def test_streamed_and_held_labeled_images_are_the_same(shapes, monkeypatch):
    held = take(configured(shapes), 60)
    monkeypatch.setattr(read, "HELD_BYTES", 0)
    asked: Counter[tuple[str, ...]] = Counter()

    def counted(units: Any, labels: str | None, patience: Patience) -> Any:
        for unit, table in read_inline(units, labels, patience):
            asked[unit.group.columns] += len(unit.order)
            yield unit, table

    assert same(held, take(configured(shapes), 60, reader=counted))
    assert asked[LABELED] >= 60 * 4
    assert same(held[23:27], take(configured(shapes), 4, start=23))


def test_an_index_of_an_earlier_version_gives_the_same_batches(shapes, monkeypatch):
    def older(root: str) -> Dataset:
        found = open_dataset(root)
        return Dataset(found.root, found.info, found.index.select(OLDER_INDEX.names))

    expected = take(configured(shapes), 12)
    monkeypatch.setattr(read, "HELD_BYTES", 0)  # held nevertheless: a row group would be read for each image
    monkeypatch.setattr("tests.unit.ingest.loading.open_dataset", older)
    assert same(expected, take(configured(shapes), 12))


def test_a_changed_byte_is_told(shapes, tmp_path, monkeypatch):
    dataset = open_dataset(shapes)
    group = select_groups(dataset, load_split(dataset, "1_4").labeled, LABELED)[0]
    original = stored.storage.read_range

    def changed(uri: str, offset: int, size: int) -> bytes:
        data = bytearray(original(uri, offset, size))
        data[group.places[1][0].start - offset] ^= 1
        return bytes(data)

    monkeypatch.setattr(stored.storage, "read_range", changed)
    with pytest.raises(stored.UserError, match=rf"/{group.shard}: {group.ids[0]} is damaged \(checksum.*prepare"):
        read.read_rows(group, None, Patience())
