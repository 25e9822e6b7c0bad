"""Starting and reading cost the same whatever the size of the pool: counted, not timed."""

import itertools
import tracemalloc
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.ingest.order import Mixture, open_source
from pipeline.ingest.read import SampleStream, read_inline
from pipeline.patience import Patience
from tests.pools import GROUP_ROWS, ROWS_PER_SHARD, link_parts, write_part, write_pool

LANES = 16


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    file = tmp_path_factory.mktemp("scale") / "part.parquet"
    return file, write_part(file, 24, 32)


def opened(uri: str) -> Mixture:
    return Mixture([open_source(uri)], LANES, 0)


def test_start_reads_and_holds_the_same_for_a_thousand_shards_and_a_million(tmp_path, part, monkeypatch):
    """Up to the first batch: which files are touched, and how much memory is taken."""
    touched: list[str] = []
    resolve = storage.resolve

    def watched(uri: str):
        touched.append(uri)
        return resolve(uri)

    counts, peaks = [], []
    for shards in (10**3, 10**4, 10**5, 10**6):
        uri = write_pool(tmp_path / str(shards), shards * ROWS_PER_SHARD, part[1])
        link_parts(part[0], (unit.group for unit in itertools.islice(opened(uri).units(range(LANES), 0), LANES)))
        with monkeypatch.context() as patch:
            patch.setattr(storage, "resolve", watched)
            touched.clear()
            tracemalloc.start()
            batch = next(iter(SampleStream(opened(uri), range(LANES), 0, read_inline, None, Patience())))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert len(batch) == LANES
        counts.append([len(touched), len(set(touched))])
    assert counts == [counts[0]] * 4
    assert counts[0][1] <= 3 + LANES  # whether it is a dataset, where the pool is, pool.json; a group for each lane
    assert max(peaks[1:]) < 1.5 * peaks[0]


@pytest.mark.parametrize("start", [0, 1000])
def test_reading_holds_and_reads_the_same_from_a_thousand_rows_and_a_hundred_thousand(
    tmp_path, part, monkeypatch, start
):
    steps, read, held = 200, [], []

    def streamed(rows: int) -> tuple[int, int]:
        uri = write_pool(tmp_path / f"{rows}", rows, part[1])
        units = itertools.takewhile(
            lambda unit: unit.first_step < start + 2 * steps, opened(uri).units(range(LANES), start)
        )
        link_parts(part[0], (unit.group for unit in units))
        asked, read, most = 0, 0, 0

        def counted(units, labels, patience):
            nonlocal asked, read
            for item in read_inline(units, labels, patience):
                asked += 1
                read += len(item[0].order)
                yield item

        samples = iter(SampleStream(opened(uri), range(LANES), start, counted, None, Patience()))
        for step in range(1, steps + 1):
            next(samples)
            most = max(most, read - step * LANES)
        return asked, most

    for rows in (1_000, 100_000):
        asked, most = streamed(rows)
        read.append(asked)
        held.append(most)
    assert max(held) <= LANES * GROUP_ROWS  # encoded images; a group per lane
    assert abs(read[0] / read[1] - 1) < 0.2  # row groups; the last one of an epoch is smaller
