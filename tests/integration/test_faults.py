"""A storage in trouble: every row still comes exactly once, or the run ends with one line and can go on later."""

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.datasets.prepared.dataset import Dataset, open_dataset, read_group
from pipeline.errors import UserError
from pipeline.ingest import read
from pipeline.ingest.groups import select_groups
from pipeline.ingest.loader import PREFETCH_STEPS
from pipeline.ingest.order import LanePlan, Unit
from pipeline.ingest.read import read_inline, read_ray
from pipeline.patience import Patience
from tests.jobs import Job, environment, has_checkpoint, records, train_command
from tests.processes import wait_for
from tests.proxy import FaultProxy
from tests.s3 import S3Server
from tests.unit.ingest.loading import both_views, configured, loader_of, same, take

ROOT = "s3://data/shapes"
LANES = 8
LARGEST = 6
"""Rows of a row group at most."""
AWAY = 8.0
"""Seconds for which the killed server is away."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One that may be killed."""
    with S3Server(tmp_path_factory.mktemp("faults")) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    """The way to it, also for the processes of the Ray that this module starts later."""
    with FaultProxy(server.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        for key, value in {**server.environment(), "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            patch.setenv(key, value)
        storage.reconnect()
        yield proxy
        storage.reconnect()


@pytest.fixture(scope="module")
def dataset(proxy: FaultProxy, shapes: str) -> Dataset:
    """The shapes dataset on the server."""
    for file in storage.list_files(shapes):
        storage.write_bytes(storage.join(ROOT, file), storage.read_bytes(storage.join(shapes, file)))
    return open_dataset(ROOT)


@pytest.fixture(autouse=True)
def _calm(proxy: FaultProxy) -> Iterator[None]:
    proxy.counts.clear()
    yield
    proxy.set()


def epoch(dataset: Dataset, read: read.Reader) -> tuple[dict[str, bytes], int]:
    """All rows of the train images, each of which must come once, and how often the storage was asked again."""
    names = dataset.subset("train")["id"].to_pylist()
    plan = LanePlan(select_groups(dataset, names), LANES, 0)
    found: dict[str, bytes] = {}
    patience = Patience()
    for unit, table in read(plan.units(range(LANES), 0), None, patience):
        assert unit.epoch < 2, f"{len(found)} of {len(names)} rows"
        if unit.epoch == 0:
            assert not found.keys() & set(table["id"].to_pylist())
            found.update(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))
        if len(found) == len(names):
            break
    return found, patience.retries


@pytest.fixture(scope="module")
def expected(shapes: str) -> dict[str, bytes]:
    """The same from the disk."""
    return epoch(open_dataset(shapes), read_inline)[0]


@pytest.mark.parametrize("fault", ["refuse", "silent", "stall", "reset", "slow_down"])
def test_a_storage_that_stays_away_is_named_in_time(
    proxy: FaultProxy, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT", 1.0)
    storage.reconnect()
    patience, shard, began = Patience(6.0), dataset.index["shard"][0].as_py(), time.monotonic()
    proxy.set(fault)
    with pytest.raises(UserError, match=rf"^{ROOT}/{shard}: the (endpoint|storage) .* \(waited \d+ s\)$"):
        read_group(ROOT, shard, 0, ["id", "image"], patience)
    assert 6 <= time.monotonic() - began < 60
    if fault in ("refuse", "reset", "slow_down"):  # the others use up the time at once
        assert patience.retries > 0
    if fault != "refuse":
        assert proxy.counts[fault] > storage.REQUEST_ATTEMPTS
    proxy.set()
    assert read_group(ROOT, shard, 0, ["id", "image"]).num_rows
    storage.reconnect()


@pytest.mark.usefixtures("ray_cluster")
class TestStream:
    @pytest.fixture(autouse=True)
    def _small_tasks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(read, "ITEM_ROWS", 24)

    def test_brief_trouble_costs_no_row(self, proxy: FaultProxy, dataset: Dataset, expected: dict[str, bytes]) -> None:
        # the first two are more than pyarrow alone gets over
        for faults in (["slow_down"] * 4, ["reset"] * 6, ["stall"]):
            proxy.plan(*faults, path="shards/train")
        found, retries = epoch(dataset, read_ray)
        assert found == expected
        assert retries >= 2
        assert proxy.planned == 0
        assert [proxy.counts[fault] for fault in ("slow_down", "reset", "stall")] == [4, 6, 1]

    def test_a_killed_server_that_comes_back_costs_no_row(
        self, server: S3Server, dataset: Dataset, expected: dict[str, bytes]
    ) -> None:
        back = threading.Timer(AWAY, server.restart)

        def killing(units, labels, patience):
            for number, item in enumerate(read_ray(units, labels, patience)):
                if number == 0:  # the next tasks are under way
                    server.kill()
                    back.start()
                yield item

        try:
            found, retries = epoch(dataset, killing)
        finally:
            back.join()
        assert found == expected
        assert retries > 0

    def test_slow_answers_change_no_batch_and_no_bound(
        self, proxy: FaultProxy, dataset: Dataset, shapes: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Labeled and unlabeled images come slowly; then they wait, as nobody takes them."""
        monkeypatch.setattr(read, "SEGMENT_ITEMS", 2)
        planned = 0

        def reader(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
            def told() -> Iterator[Unit]:
                nonlocal planned
                for unit in units:
                    planned += len(unit.group.rows)
                    yield unit

            return read_ray(told(), labels, patience)

        proxy.rate = 500_000
        proxy.set("slow", "GET ", "/shards/train")
        loader = loader_of(configured(dataset.root), reader=reader)
        labeled = proxy.counts["slow"]
        try:
            batches = list(itertools.islice(loader, 40))
            assert proxy.counts["slow"] > labeled > 0
            wait_for("all that has room", loader._ready.full)
        finally:
            loader.close()
        assert same(batches, take(configured(shapes), 40))
        assert {(len(labeled.ids), len(unlabeled.ids)) for labeled, unlabeled in map(both_views, batches)} == {(4, 6)}
        # of labeled and of unlabeled images two segments, what fills the last item of each, and the steps that are made
        most = 2 * 2 * read.SEGMENT_ITEMS * (read.ITEM_ROWS + LARGEST) + (4 + 6) * (PREFETCH_STEPS + 2)
        assert planned - 40 * (4 + 6) <= most

    def test_damage_is_named(self, dataset: Dataset) -> None:
        whole = storage.read_bytes(shard := storage.join(ROOT, dataset.subset("train")["shard"][0].as_py()))
        flipped = bytearray(whole)
        flipped[len(whole) // 3] ^= 1
        try:
            for spoilt in (bytes(flipped), whole[: len(whole) // 2]):
                storage.write_bytes(shard, spoilt)
                with pytest.raises(UserError, match=rf"^{shard}: \S+ is damaged \(checksum[^\n]*\); prepare"):
                    epoch(dataset, read_ray)
        finally:
            storage.write_bytes(shard, whole)


@pytest.mark.night
def test_a_run_without_storage_ends_and_goes_on(
    server: S3Server, proxy: FaultProxy, dataset: Dataset, ray_folder: str, tmp_path: Path
) -> None:
    """Data and results on the same storage: briefly in trouble, then away for good, then back."""
    run = "s3://runs/away"
    flags = ["--data", ROOT, "--out", run, "--optim.steps", "50", "--u2pl.warmup", "5", "--scaling.workers", "1"]
    command = train_command(*flags, "--run.checkpoint_every", "10", "--run.storage_patience", "10")
    env = {**environment(ray_folder, server), "AWS_ENDPOINT_URL": proxy.endpoint}
    with Job(command, env, tmp_path / "first.log") as job:
        wait_for("a worker that begins to read", lambda: "reading" in job.said or job.ended, 400)
        proxy.plan(*["reset"] * 12, path="shards/train")  # four threads read the first item: one of them meets three
        wait_for("a registered checkpoint", lambda: has_checkpoint(run), 400)
        proxy.set("refuse")
        began = time.monotonic()
        assert job.wait() == 2, job.said
        assert time.monotonic() - began < 60
        last = job.said.splitlines()[-1]
        assert last.startswith("train.py: s3://")
        assert "the endpoint does not answer" in last
        assert "once that is mended, the same command goes on from the last checkpoint" in last
        assert "Traceback" not in job.said
        assert "was lost" not in job.said  # workers in its place would only have waited again
    proxy.set()
    assert proxy.planned == 0
    assert records(run)[-1]["retries"] > 0
    proxy.rate = 2_000_000
    proxy.set("slow", "GET ", "/shards/train")
    with Job(command, env, tmp_path / "second.log") as job:
        assert job.wait(400) == 0, job.said
        assert f"resuming from {run}/step_" in job.said
    assert proxy.counts["slow"] > 0
    assert [record["step"] for record in records(run)] == list(range(1, 51))
    images = {round(record["images_per_second"] * record["worker_seconds"]) for record in records(run)}
    assert images == {4 + 8}, "labeled and unlabeled images of a step"
