"""How many workers a run gets, before any of them starts."""

import pytest

from pipeline import cli, cluster
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.training.scaling import allowed_counts, worker_counts, worker_cpus, worker_gpus, workers_of


def _config(*flags: str) -> Config:
    return cli.parse_config(["--preset", "demo", *flags], "", OPTIONS)[0]


def _pretend(monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float, coming: float = 0.0) -> None:
    """A cluster of that size, and the GPUs that it could start."""
    monkeypatch.setattr(cluster, "cpus_and_gpus", lambda: (cpus, gpus))
    monkeypatch.setattr(cluster, "capacity", lambda: (cpus, max(gpus, coming)))


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
    ("asked", "cpus", "gpus", "counts"),
    [
        ("auto", 2, 0, (2,)),
        ("auto", 1, 0, (1,)),
        ("auto", 64, 0, (2,)),
        ("auto", 64, 3, (2,)),
        ("auto", 64, 8, (4,)),
        ("4", 2, 0, (4,)),
        ("1..4", 2, 0, (1, 2, 4)),
        ("2..3", 8, 3, (2,)),
        ("2..4", 8, 2, (2, 4)),  # two more may come
    ],
)
def test_worker_counts(
    monkeypatch: pytest.MonkeyPatch, asked: str, cpus: float, gpus: float, counts: tuple[int, ...]
) -> None:
    _pretend(monkeypatch, cpus, gpus)
    assert worker_counts(_config("--scaling.workers", asked)) == counts


@pytest.mark.parametrize(
    ("asked", "gpus", "named"), [("3", 0, "1, 2, 4"), ("3..3", 0, "1, 2, 4"), ("4", 2, "2 GPUs"), ("4..8", 2, "2 GPUs")]
)
def test_impossible_worker_counts(monkeypatch: pytest.MonkeyPatch, asked: str, gpus: float, named: str) -> None:
    _pretend(monkeypatch, 8.0, gpus)
    with pytest.raises(UserError, match=named):
        worker_counts(_config("--scaling.workers", asked))


@pytest.mark.parametrize("asked", ["0", "4..2", "..4", "2..", "-1", "two", "1.5", "\u00b2"])
def test_what_is_no_number_of_workers(asked: str) -> None:
    with pytest.raises(UserError, match=r"scaling\.workers: expected such as 4, 2\.\.8 or auto"):
        _config(f"--scaling.workers={asked}")


def test_gpus_that_are_not_up_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that has scaled its GPU nodes to none is no cluster of CPUs."""
    _pretend(monkeypatch, 8.0, 0.0, coming=8.0)
    workers = workers_of(_config("--scaling.workers", "4"))
    assert workers.resources == {"CPU": pytest.approx(1.9375), "GPU": 1.0}
    with pytest.raises(UserError, match=r"no GPU yet and can get 8: say how many"):
        worker_counts(_config())
    assert worker_gpus(_config("--scaling.gpus_per_worker", "0")) == 0


def test_a_share_of_a_gpu_is_for_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, 8.0, 1.0)
    workers = workers_of(_config("--scaling.gpus_per_worker", "0.5"))
    assert (workers.counts, workers.gpus) == ((1,), 0.5)
    with pytest.raises(UserError, match="cannot share a GPU"):
        _config("--scaling.gpus_per_worker", "0.5", "--scaling.workers", "2")
    with pytest.raises(UserError, match="whole numbers"):
        _config("--scaling.gpus_per_worker", "1.5")


@pytest.mark.parametrize(
    ("method", "workers", "cpus", "gpus", "share"),
    [("u2pl", 2, 2, 0, 0.5), ("suponly", 4, 2, 0, 0.5), ("u2pl", 8, 64, 8, 4.0), ("u2pl", 4, 16, 4, 3.9375)],
)
def test_workers_leave_cpus_for_reading(
    monkeypatch: pytest.MonkeyPatch, method: str, workers: int, cpus: float, gpus: float, share: float
) -> None:
    _pretend(monkeypatch, cpus, gpus)
    assert worker_cpus(_config("--method", method), workers) == share


def test_workers_that_take_every_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, 2.0, 0.0)
    with pytest.raises(UserError, match=r"lower scaling\.workers"):
        worker_cpus(_config(), 4)


def test_decoding_tasks_need_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, 2.0, 0.0)
    assert worker_cpus(_config("--run.decode", "cluster"), 1) == 0.5
    with pytest.raises(UserError, match=r"leave less than 1\.25 for reading"):
        worker_cpus(_config("--run.decode", "cluster"), 2)
