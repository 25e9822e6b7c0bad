"""What the launcher decides before any worker starts."""

import dataclasses
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config import Config
from pipeline.datasets.format import open_dataset
from pipeline.datasets.splits import load_split
from pipeline.errors import UserError
from pipeline.ingest import mixture
from pipeline.methods import OPTIONS
from pipeline.training import launch


def _config(*flags: str) -> Config:
    return cli.parse_config(["--preset", "demo", *flags], "", OPTIONS)[0]


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
    assert launch.allowed_workers(_config("--method", method, *sizes)) == allowed


@pytest.mark.parametrize(
    ("asked", "cpus", "gpus", "count"),
    [(0, 2, 0, 2), (0, 1, 0, 1), (0, 64, 0, 2), (0, 64, 3, 2), (0, 64, 8, 4), (4, 2, 0, 4)],
)
def test_worker_count(monkeypatch: pytest.MonkeyPatch, asked: int, cpus: float, gpus: float, count: int) -> None:
    monkeypatch.setattr(launch.cluster, "cpus_and_gpus", lambda: (cpus, gpus))
    assert launch.worker_count(_config("--run.workers", str(asked))) == count


@pytest.mark.parametrize(
    ("method", "workers", "cpus", "gpus", "share"),
    [("u2pl", 2, 2, 0, 0.5), ("suponly", 4, 2, 0, 0.5), ("u2pl", 8, 64, 8, 4.0), ("u2pl", 4, 16, 4, 3.9375)],
)
def test_workers_leave_cpus_for_reading(
    monkeypatch: pytest.MonkeyPatch, method: str, workers: int, cpus: float, gpus: float, share: float
) -> None:
    monkeypatch.setattr(launch.cluster, "cpus_and_gpus", lambda: (cpus, gpus))
    assert launch.worker_cpus(_config("--method", method), workers) == share


def test_workers_that_take_every_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.cluster, "cpus_and_gpus", lambda: (2.0, 0.0))
    with pytest.raises(UserError, match=r"lower run\.workers"):
        launch.worker_cpus(_config(), 4)


def test_decoding_tasks_need_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.cluster, "cpus_and_gpus", lambda: (2.0, 0.0))
    assert launch.worker_cpus(_config("--run.decode", "cluster"), 1) == 0.5
    with pytest.raises(UserError, match=r"leave less than 1\.25 for reading"):
        launch.worker_cpus(_config("--run.decode", "cluster"), 2)


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: str) -> None:
    monkeypatch.chdir(tmp_path)
    placed = launch.placed(_config("--data", shapes, "--out", "runs/a"))
    assert placed.out == str(tmp_path / "runs/a")
    assert launch.placed(_config("--data", shapes)).out == str(tmp_path / "runs/shapes-u2pl-1_2-s0")
    with pytest.raises(UserError, match="no dataset named"):
        launch.placed(cli.parse_config(["--preset", "camvid"], "", OPTIONS)[0])
    job = tmp_path / "working_dir_files" / "package"  # where a submitted job runs; Ray deletes it
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert launch.placed(_config("--data", shapes, "--out", "runs/a")).out == str(tmp_path / "home/u2pl-ray/runs/a")


@pytest.mark.parametrize(("asked", "gpus", "named"), [(3, 0, "1, 2, 4"), (4, 2, "2 GPUs")])
def test_impossible_worker_counts(monkeypatch: pytest.MonkeyPatch, asked: int, gpus: float, named: str) -> None:
    monkeypatch.setattr(launch.cluster, "cpus_and_gpus", lambda: (8.0, gpus))
    with pytest.raises(UserError, match=named):
        launch.worker_count(_config("--run.workers", str(asked)))


def test_fresh_deletes_runs_and_nothing_else(tmp_path: Path) -> None:
    photo, config = tmp_path / "photo.jpg", _config("--out", str(tmp_path))
    photo.write_bytes(b"precious")
    launch._claim(config, fresh=True)
    assert photo.exists()
    assert (tmp_path / "config.yaml").exists()
    (tmp_path / "step_0000300").mkdir()
    (tmp_path / "step_0000300" / "state.pt").write_bytes(b"old")
    launch._claim(config, fresh=True)
    assert photo.exists()
    assert not (tmp_path / "step_0000300").exists()


def test_a_run_directory_keeps_its_settings(tmp_path: Path) -> None:
    config = _config("--out", str(tmp_path))
    launch._claim(config, fresh=False)
    machines = dataclasses.replace(config, run=dataclasses.replace(config.run, workers=4, log_every=7))
    launch._claim(machines, fresh=False)  # other machines are no other run
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))
    with pytest.raises(UserError, match=r"optim\.lr 0\.003 instead of 0\.5"):
        launch._claim(other, fresh=False)


def test_a_run_keeps_the_generations_it_began_with(
    tmp_path: Path, shapes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool of a second generation goes on with the first one if the run did."""
    dataset = open_dataset(shapes)
    split = load_split(dataset, "1_2")
    there = 1

    def opened(uri: str, weight: float | None, generations: int | None) -> mixture.Source:
        table = mixture.select_groups(dataset, split.unlabeled)
        return mixture.Source(uri, table, 200, weight or 200, generations or there, f"{generations or there}")

    monkeypatch.setattr(mixture, "open_source", opened)

    def pinned(*flags: str, fresh: bool = False) -> tuple[int, ...]:
        config = _config("--data", shapes, "--out", str(tmp_path), "--data.unlabeled_pools", "/a", *flags)
        config, sources = launch._with_pools(config, dataset, split, fresh)
        launch._claim(config, fresh)
        assert [source.generations for source in sources] == [0, *config.data.pool_generations]
        return config.data.pool_generations

    assert pinned() == (1,)
    there = 2
    assert pinned() == (1,)
    with pytest.raises(UserError, match=r"data\.pool_generations \[1\] instead of \[2\]"):
        pinned("--data.pool_generations", "2")
    with pytest.raises(UserError, match=r"data\.unlabeled_pools .* instead of "):
        pinned("/b")
    assert pinned(fresh=True) == (2,)


def test_methods_without_unlabeled_images_open_no_pool(shapes: str, tmp_path: Path) -> None:
    dataset = open_dataset(shapes)
    config = _config("--data", shapes, "--out", str(tmp_path), "--method", "suponly", "--data.unlabeled_pools", "/no")
    assert launch._with_pools(config, dataset, load_split(dataset, "1_2"), False) == (config, [])


def test_a_dataset_without_val_is_refused(shapes: str) -> None:
    dataset = open_dataset(shapes)
    launch.check_val(dataset)
    empty = dataclasses.replace(dataset, info=dataclasses.replace(dataset.info, counts={"train": 400, "val": 0}))
    with pytest.raises(UserError, match="no validation images"):
        launch.check_val(empty)


class _Failed(Exception):
    """As Ray Train reports the end of a run."""

    def __init__(self, controller: Exception | None = None, workers: list[Exception] | None = None) -> None:
        if controller is not None:
            self.controller_failure = controller
        self.worker_failures = dict(enumerate(workers or []))


class _Wrapped(Exception):
    """As Ray Train hands on what a worker raised."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (_Failed(UserError("s3://b/x: damaged")), "s3://b/x: damaged"),
        (_Failed(OSError("AWS Error NETWORK_CONNECTION during PutObject")), "s3://b/run: the endpoint does not answer"),
        (_Failed(workers=[_Wrapped(ValueError("no")), _Wrapped(UserError("too many are damaged"))]), "too many are"),
        (_Failed(workers=[_Wrapped(ValueError("no"))]), ""),
        (_Failed(RuntimeError("no")), ""),
    ],
)
def test_what_ended_a_run_is_told_if_someone_can_mend_it(error: Exception, told: str) -> None:
    found = launch._user_error(error, "s3://b/run")
    assert found.startswith(told)
    assert bool(found) == bool(told)
