"""What the launcher decides before any worker starts."""

import dataclasses
from pathlib import Path

import pytest

from pipeline.config import cli
from pipeline.config.schema import Config
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.errors import UserError
from pipeline.ingest import order
from pipeline.methods import OPTIONS
from pipeline.training import launch, preflight


def _config(*flags: str) -> Config:
    return cli.parse_config(["--preset", "demo", *flags], "", OPTIONS)[0]


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: str) -> None:
    monkeypatch.chdir(tmp_path)
    placed = preflight.resolve_paths(_config("--data", shapes, "--out", "runs/a"))
    assert placed.out == str(tmp_path / "runs/a")
    assert preflight.resolve_paths(_config("--data", shapes)).out == str(tmp_path / "runs/shapes-u2pl-1_2-s0")
    with pytest.raises(UserError, match="no dataset named"):
        preflight.resolve_paths(cli.parse_config(["--preset", "camvid"], "", OPTIONS)[0])
    job = tmp_path / "working_dir_files" / "package"  # where a submitted job runs; Ray deletes it
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert preflight.resolve_paths(_config("--data", shapes, "--out", "runs/a")).out == str(
        tmp_path / "home/u2pl-ray/runs/a"
    )


def test_fresh_deletes_runs_and_nothing_else(tmp_path: Path) -> None:
    photo, config = tmp_path / "photo.jpg", _config("--out", str(tmp_path))
    photo.write_bytes(b"precious")
    launch.begin_run(config, fresh=True)
    assert photo.exists()
    assert (tmp_path / "config.yaml").exists()
    (tmp_path / "step_0000300").mkdir()
    (tmp_path / "step_0000300" / "state.pt").write_bytes(b"old")
    launch.begin_run(config, fresh=True)
    assert photo.exists()
    assert not (tmp_path / "step_0000300").exists()


def test_a_run_directory_keeps_its_settings(tmp_path: Path) -> None:
    config = _config("--out", str(tmp_path))
    launch.begin_run(config, fresh=False)
    machines = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, log_every=7),
        scaling=dataclasses.replace(config.scaling, workers="4"),
    )
    launch.begin_run(machines, fresh=False)  # other machines are no other run
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))
    with pytest.raises(UserError, match=r"optim\.lr 0\.003 instead of 0\.5"):
        launch.begin_run(other, fresh=False)


def test_a_run_keeps_the_generations_it_began_with(
    tmp_path: Path, shapes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool of a second generation goes on with the first one if the run did."""
    dataset = open_dataset(shapes)
    split = load_split(dataset, "1_2")
    there = 1

    def opened(uri: str, weight: float | None, generations: int | None) -> order.Source:
        table = order.select_groups(dataset, split.unlabeled)
        return order.Source(uri, table, 200, weight or 200, generations or there, f"{generations or there}")

    monkeypatch.setattr(order, "open_source", opened)

    def pinned(*flags: str, fresh: bool = False) -> tuple[int, ...]:
        config = _config("--data", shapes, "--out", str(tmp_path), "--data.unlabeled_pools", "/a", *flags)
        config, sources = preflight.with_pools(config, dataset, split, fresh)
        launch.begin_run(config, fresh)
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
    assert preflight.with_pools(config, dataset, load_split(dataset, "1_2"), False) == (config, [])


def test_a_dataset_without_val_is_refused(shapes: str) -> None:
    dataset = open_dataset(shapes)
    preflight.check_val(dataset)
    empty = dataclasses.replace(dataset, info=dataclasses.replace(dataset.info, counts={"train": 400, "val": 0}))
    with pytest.raises(UserError, match="no validation images"):
        preflight.check_val(empty)


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
    found = launch.user_error(error, "s3://b/run")
    assert found.startswith(told)
    assert bool(found) == bool(told)
