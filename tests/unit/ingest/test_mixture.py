"""Several unlabeled sources in one stream."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.config.cli import resolve
from pipeline.config.methods import ViewSpec
from pipeline.config.schema import Config
from pipeline.datasets.pools import make
from pipeline.datasets.pools.pool import Generation, Pool, PoolInfo
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.errors import UserError
from pipeline.ingest.groups import PoolTable, select_groups
from pipeline.ingest.loader import Loader
from pipeline.ingest.order import LanePlan, Mixture, Source, open_sources, owned_lanes, share_lanes
from pipeline.ingest.read import read_inline
from pipeline.methods import OPTIONS
from pipeline.patience import Patience
from tests.groups import GroupList


def _pool(rows: list[int], group_rows: int = 4, groups_per_shard: int = 3) -> Pool:
    generations = tuple(
        Generation(rows=count, shards=-(-count // (group_rows * groups_per_shard)), bytes=10 * count, digest=f"{count}")
        for count in rows
    )
    return Pool("root", PoolInfo(
        name="p", source="images", root="photos", kind="links", group_rows=group_rows,
        groups_per_shard=groups_per_shard, generations=generations,
    ))  # fmt: skip


@pytest.mark.parametrize("rows", [[40], [41], [3], [40, 7, 12], [1, 1, 1], [13, 24]])
def test_the_table_of_a_pool(rows):
    pool = _pool(rows)
    table = PoolTable(pool, len(rows))
    groups = [table[number] for number in range(len(table))]
    for number, count in enumerate(rows):
        ours = [group for group in groups if group.shard.startswith(f"gen-{number:05d}/")]
        assert sum(len(group.rows) for group in ours) == count
        assert len({group.shard for group in ours}) == pool.info.generations[number].shards
        assert [group.row_group for group in ours] == [place % 3 for place in range(len(ours))]
    plain = GroupList(groups)
    assert dict(zip(table.short.tolist(), table.counts.tolist(), strict=True)) == {
        number: len(group.rows) for number, group in enumerate(groups) if len(group.rows) < 4
    }
    assert groups[0].links == "photos"
    for start in (0, 17):  # the plan is that of the listed groups
        units = itertools.islice(LanePlan(table, 3, 0).units(range(3), start), 60)
        assert list(units) == list(itertools.islice(LanePlan(plain, 3, 0).units(range(3), start), 60))


def test_the_first_generations_alone():
    assert len(PoolTable(_pool([40, 7]), 1)) == 10
    assert len(PoolTable(_pool([40, 7]), 2)) == 12


def test_a_pool_of_a_billion_images():
    pool = _pool([10**9 + 1, 5], group_rows=64, groups_per_shard=64)
    table = PoolTable(pool, 2)
    last = [table[number] for number in range(len(table) - 3, len(table))]
    assert [(group.shard, group.row_group, len(group.rows)) for group in last] == [
        ("gen-00000/part-0244140.parquet", 39, 64),
        ("gen-00000/part-0244140.parquet", 40, 1),
        ("gen-00001/part-0000000.parquet", 0, 5),
    ]
    units = itertools.islice(LanePlan(table, 16, 0).units(range(16), 10**8), 16)  # in the second epoch
    assert {(unit.first_step, unit.epoch) for unit in units} == {(10**8, 1)}


def _source(name: str, images: int, weight: float | None = None) -> Source:
    table = PoolTable(_pool([images]), 1)
    return Source(name, table, images, weight or images, 1, name)


@pytest.mark.parametrize(
    ("weights", "lanes", "expected"),
    [
        ([1], 8, [8]),
        ([1, 1], 8, [4, 4]),
        ([7, 2, 1], 10, [7, 2, 1]),
        ([7, 2, 1], 16, [11, 3, 2]),
        ([10**8, 1, 1], 16, [14, 1, 1]),
        ([1, 10**9], 2, [1, 1]),
        ([3, 3, 3], 10, [4, 3, 3]),
    ],
)
def test_lanes_are_shared_by_weight(weights, lanes, expected):
    sources = [_source(f"s{number}", 100, weight) for number, weight in enumerate(weights)]
    assert share_lanes(sources, lanes) == expected


def test_impossible_shares():
    with pytest.raises(UserError, match=r"3 unlabeled sources but optim\.batch_unlabeled 2"):
        share_lanes([_source(name, 50) for name in "abc"], 2)
    with pytest.raises(UserError, match=r"few: 3 unlabeled images, fewer than its 5 of optim\.batch_unlabeled 10"):
        share_lanes([_source("few", 3, 1), _source("many", 50, 1)], 10)


def _ids(plan: Mixture, lanes: range, start: int, steps: int) -> dict[int, list[tuple[str, int, int]]]:
    found: dict[int, list[tuple[str, int, int]]] = {lane: [] for lane in lanes}
    for unit in plan.units(lanes, start):
        if unit.first_step >= start + steps:
            break
        assert unit.first_step == start + len(found[unit.lane])
        found[unit.lane] += [(unit.group.shard, unit.epoch, row) for row in unit.order]
    return {lane: rows[:steps] for lane, rows in found.items()}


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_mixture_does_not_depend_on_the_workers(world):
    sources = [_source("a", 41, 2), _source("b", 57, 1)]
    whole = _ids(Mixture(sources, 8, 0), range(8), 0, 60)
    for start in (0, 13, 40):
        for rank in range(world):
            for lane, rows in _ids(Mixture(sources, 8, 0), owned_lanes(8, rank, world), start, 15).items():
                assert rows == whole[lane][start : start + 15]


def test_every_worker_reads_from_all_sources():
    order = Mixture([_source("a", 100, 3), _source("b", 100, 1)], 16, 0).source_of
    assert Counter(order) == {0: 12, 1: 4}
    for rank in range(4):
        assert {order[lane] for lane in owned_lanes(16, rank, 4)} == {0, 1}


# ---- with real data -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pool of links to 90 images of the shapes dataset under names of its own."""
    root = tmp_path_factory.mktemp("pool")
    (root / "photos").mkdir()
    for name, image in itertools.islice(_images(shapes), 90):
        (root / "photos" / f"{name}.png").write_bytes(image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make.tasks, "run", lambda task, items, *_: map(task, items))
        make.make_pool("images", str(root / "photos"), str(root / "pool"))
    return str(root / "pool")


def _images(shapes: str) -> Iterator[tuple[str, bytes]]:
    dataset = open_dataset(shapes)
    plan = LanePlan(select_groups(dataset, dataset.index["id"].to_pylist()), 1, 0)
    for _, table in read_inline(plan.units(range(1), 0), None, Patience()):
        yield from zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True)


def _config(root: str, *pools: str, split: str = "1_4", **data: Any) -> Config:
    values = {"root": root, "crop": [40, 32], "unlabeled_pools": list(pools), **data}
    optim = {"batch_labeled": 4, "batch_unlabeled": 6}
    return resolve({"split": split, "data": values, "optim": optim}, OPTIONS)


def _sources(config: Config) -> list[Source]:
    dataset = open_dataset(str(config.data.root))
    return open_sources(config, dataset, load_split(dataset, config.split))


def test_sources(shapes, pool):
    own, linked, other = _sources(_config(shapes, pool, shapes))
    assert (own.name, own.images, own.weight, own.generations) == ("own images", 300, 300, 0)
    assert (linked.name, linked.images, linked.generations) == (pool, 90, 1)
    assert (other.name, other.images, other.generations) == (shapes, 400, 1)
    assert [source.weight for source in _sources(_config(shapes, pool, pool_weights=[2, 1]))] == [2, 1]
    assert [source.name for source in _sources(_config(shapes, pool, pool_weights=[0, 1]))] == [pool]
    with pytest.raises(UserError, match="has 1 generations, the run began with 2"):
        _sources(_config(shapes, pool, pool_generations=[2]))
    with pytest.raises(UserError, match="nowhere: no pool there"):
        _sources(_config(shapes, "nowhere"))


def test_labeled_images_are_not_repeated_if_there_is_a_pool(shapes, pool):
    assert [source.images for source in _sources(_config(shapes, split="full"))] == [400]
    assert [source.name for source in _sources(_config(shapes, pool, split="full"))] == [pool]


@pytest.mark.parametrize("world", [1, 2])
def test_batches_hold_both(shapes, pool, world):
    config = _config(shapes, pool, pool_weights=[1, 1])
    dataset = open_dataset(shapes)
    split = load_split(dataset, "1_4")
    seen: list[list[str]] = [[] for _ in range(5)]
    for rank in range(world):
        loader = Loader(config, dataset, split, ViewSpec(unlabeled=True), rank=rank, world=world, start=7, threads=1,
                        reader=read_inline)  # fmt: skip
        for step, batch in enumerate(itertools.islice(loader, 5)):
            assert batch.unlabeled is not None
            assert batch.unlabeled.mask is None
            assert batch.unlabeled.valid.flatten(1).any(1).all()
            seen[step] += batch.unlabeled.ids
        loader.close()
        assert loader.stats.skipped == 0
    for ids in seen:
        assert sum(name.endswith(".png") for name in ids) == 3
        assert sum(name in split.unlabeled for name in ids) == 3
