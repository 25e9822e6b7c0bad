"""How many workers a run gets, before any of them starts."""

import pytest

from pipeline.cluster import nodes
from pipeline.cluster.nodes import Machine, Workers, places
from pipeline.config import cli
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.training.scaling import allowed_counts, workers_of


def _config(*flags: str) -> Config:
    return cli.parse_config(["--preset", "demo", *flags], "", OPTIONS)[0]


def _pretend(monkeypatch: pytest.MonkeyPatch, up: str, coming: str | None = None) -> list[list[dict[str, float]]]:
    """A cluster of nodes `CPUS:GPUS CPUS:GPUS ...`, and those that come when it is asked; returns what it is asked."""
    found, asked = _machines(up), []

    def start_nodes(bundles: list[dict[str, float]]) -> None:
        asked.append(bundles)
        found.extend(_machines(coming or ""))

    monkeypatch.setattr(nodes, "machines", lambda: found)
    monkeypatch.setattr(nodes, "grows", lambda: coming is not None)
    monkeypatch.setattr(nodes, "start_nodes", start_nodes)
    return asked


def _machines(text: str) -> list[Machine]:
    return [Machine(*map(float, node.split(":"))) for node in text.split()]


@pytest.mark.parametrize(
    ("method", "labeled", "unlabeled", "allowed"),
    [
        ("suponly", 4, 7, [1, 2, 4]),
        ("u2pl", 4, 8, [1, 2, 4]),
        ("u2pl", 4, 4, [1, 2]),  # four workers would cut the CutMix pairs
        ("u2pl", 4, 6, [1]),
        ("u2pl", 16, 16, [1, 2, 4, 8]),
        ("u2pl", 3, 5, [1]),
    ],
)
def test_workers_share_the_batch(method: str, labeled: int, unlabeled: int, allowed: list[int]) -> None:
    sizes = ("--optim.batch_labeled", str(labeled), "--optim.batch_unlabeled", str(unlabeled))
    assert allowed_counts(_config("--method", method, *sizes)) == allowed


@pytest.mark.parametrize(
    ("method", "labeled", "unlabeled", "parts", "allowed"),
    [("suponly", 8, 7, 2, [1, 2, 4]), ("u2pl", 8, 8, 4, [1, 2]), ("u2pl", 8, 16, 2, [1, 2, 4]), ("u2pl", 8, 6, 4, [])],
)
def test_workers_share_every_micro_batch(
    method: str, labeled: int, unlabeled: int, parts: int, allowed: list[int]
) -> None:
    sizes = ("--optim.batch_labeled", str(labeled), "--optim.batch_unlabeled", str(unlabeled))
    assert allowed_counts(_config("--method", method, *sizes, "--optim.accumulate", str(parts))) == allowed


@pytest.mark.parametrize(
    ("asked", "up", "counts"),
    [
        ("auto", "2:0", (2,)),
        ("auto", "1:0", (1,)),
        ("auto", "0:0 1:0 1:0", (2,)),
        ("auto", "64:0", (2,)),
        ("auto", "64:3", (2,)),
        ("auto", "0:0 32:4 32:4", (4,)),
        ("4", "4:0", (4,)),
        ("1..4", "2:0", (1, 2, 4)),  # more CPUs may come
        ("2..3", "8:3", (2,)),
        ("2..4", "8:2", (2, 4)),
    ],
)
def test_worker_counts(monkeypatch: pytest.MonkeyPatch, asked: str, up: str, counts: tuple[int, ...]) -> None:
    _pretend(monkeypatch, up)
    assert workers_of(_config("--scaling.workers", asked)).counts == counts


@pytest.mark.parametrize(
    ("asked", "up", "named"),
    [
        ("3", "8:0", "1, 2, 4"),
        ("3..3", "8:0", "1, 2, 4"),
        ("4", "8:2", "2 GPUs"),
        ("4..8", "8:2", "2 GPUs"),
        ("4", "2:0", r"4 workers with 0\.5 CPUs each leave no 0\.25 for reading on a cluster of 2 CPUs"),
        ("1", "0:0", "no node of the cluster has CPUs"),
        ("1", "0.25:1", "too few CPUs for their GPUs"),
    ],
)
def test_what_a_cluster_cannot_do(monkeypatch: pytest.MonkeyPatch, asked: str, up: str, named: str) -> None:
    _pretend(monkeypatch, up)
    with pytest.raises(UserError, match=named):
        workers_of(_config("--scaling.workers", asked))


@pytest.mark.parametrize("asked", ["0", "4..2", "..4", "2..", "-1", "two", "1.5", "\u00b2"])
def test_what_is_no_number_of_workers(asked: str) -> None:
    with pytest.raises(UserError, match=r"scaling\.workers: expected such as 4, 2\.\.8 or auto"):
        _config(f"--scaling.workers={asked}")


class TestAClusterThatGrows:
    """One that has scaled its GPU nodes to none is no cluster of CPUs."""

    def test_gpus_are_asked_for_and_then_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = _pretend(monkeypatch, "0:0", coming="8:4")
        workers = workers_of(_config("--scaling.workers", "2..4"))
        assert asked == [[{"GPU": 1.0}] * 2]
        assert (workers.counts, workers.resources) == ((2, 4), {"CPU": 1.75, "GPU": 1.0})
        workers_of(_config("--scaling.workers", "4"))
        assert len(asked) == 1  # they are there

    def test_nobody_pays_for_gpus_that_nobody_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = _pretend(monkeypatch, "0:0 16:0", coming="48:4")
        with pytest.raises(UserError, match=r"no GPU yet and starts nodes .* --scaling\.workers 8"):
            workers_of(_config())
        assert asked == []

    def test_gpus_that_it_cannot_get(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = _pretend(monkeypatch, "0:0 48:2", coming="")
        with pytest.raises(UserError, match=r"scaling\.workers 4: the cluster has 2 GPUs and cannot get so many"):
            workers_of(_config("--scaling.workers", "4"))
        assert len(asked) == 1

    def test_cpus_with_what_reading_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = _pretend(monkeypatch, "0:0", coming="2:0")
        workers = workers_of(_config("--scaling.workers", "2", "--scaling.gpus_per_worker", "0"))
        assert asked == [[{"CPU": 0.5}, {"CPU": 0.5}, {"CPU": 0.25}]]
        assert workers.resources == {"CPU": 0.5}


def test_a_share_of_a_gpu_is_for_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "8:1")
    workers = workers_of(_config("--scaling.gpus_per_worker", "0.5"))
    assert (workers.counts, workers.gpus, workers.cpus) == ((1,), 0.5, 3.75)
    with pytest.raises(UserError, match="cannot share a GPU"):
        _config("--scaling.gpus_per_worker", "0.5", "--scaling.workers", "2")
    with pytest.raises(UserError, match="between 0 and 1"):
        _config("--scaling.gpus_per_worker", "2")


@pytest.mark.parametrize(
    ("method", "up", "cpus"),
    [
        ("u2pl", "2:0", 0.5),
        ("u2pl", "64:8", 4.0),
        ("u2pl", "16:4 16:4", 3.75),  # some is left on each node: a reading task needs it on one
        ("suponly", "16:4 16:4", 4.0),
        ("u2pl", "8:4 32:0", 1.75),  # the CPUs of other nodes are no use to workers beside GPUs
        ("u2pl", "64:4 8:4", 1.75),
    ],
)
def test_cpus_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, method: str, up: str, cpus: float) -> None:
    _pretend(monkeypatch, up)
    assert workers_of(_config("--method", method)).cpus == cpus


@pytest.mark.parametrize(
    ("up", "cpus", "gpus", "spare", "held"),
    [
        ("2:0", 0.5, 0, 0.25, 3),
        ("1:0 1:0", 0.75, 0, 0.25, 2),
        ("1:0 1:0", 1, 0, 0.25, 1),  # one of the nodes is needed for reading
        ("1:0 1:0 0.25:0", 1, 0, 0.25, 2),
        ("16:4 16:4", 4, 1, 0.25, 7),
        ("16:4 16:4", 3.75, 1, 0.25, 8),
        ("4:1", 0.1, 0.1, 0, 10),
        ("0:0", 1, 0, 0.25, 0),
        ("32:0", (32 - 1.25) / 14, 0, 1.25, 14),
    ],
)
def test_places(up: str, cpus: float, gpus: float, spare: float, held: int) -> None:
    assert places(_machines(up), Workers((1,), cpus, gpus, spare)) == held


def test_decoding_tasks_need_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "2:0")
    assert workers_of(_config("--run.decode", "cluster", "--scaling.workers", "1")).spare_cpus == 1.25
    with pytest.raises(UserError, match=r"leave no 1\.25 for reading"):
        workers_of(_config("--run.decode", "cluster", "--scaling.workers", "2"))
