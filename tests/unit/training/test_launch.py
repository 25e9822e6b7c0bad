"""What the launcher decides before any worker starts."""

import dataclasses
import re
from pathlib import Path

import pytest

from pipeline import checkpoint
from pipeline.checkpoint import Progress
from pipeline.config import cli
from pipeline.config.schema import Config
from pipeline.datasets.prepared.dataset import OLDER_INDEX, open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.errors import UserError
from pipeline.ingest import order
from pipeline.methods import OPTIONS
from pipeline.patience import Patience
from pipeline.training import launch, preflight
from pipeline.training.lease import held


def _config(*flags: str) -> Config:
    return cli.parse_config(["--preset", "demo", *flags], "", OPTIONS)[0]


def _checkpoint(config: Config, step: int = 3) -> None:
    folder = Path(str(config.out)) / checkpoint.name(step)
    folder.mkdir()
    checkpoint.save(folder, config, {}, {}, Progress(step), method={})


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
    for name in ("step_0000300/state.pt", "pictures/step_0000300.png", "tensorboard/pictures/step_0000300.tfevents"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"old")
    launch.begin_run(config, fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "photo.jpg"]


def test_fresh_leaves_pictures_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("IMG_0001.jpg", "step_0000300.jpg", "step_0000300.png"):
        (tmp_path / "pictures" / name).write_bytes(b"precious")
    launch.begin_run(_config("--out", str(tmp_path)), fresh=True)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["IMG_0001.jpg", "step_0000300.jpg"]


def test_a_run_directory_keeps_its_settings(tmp_path: Path) -> None:
    config = _config("--out", str(tmp_path))
    launch.begin_run(config, fresh=False)
    _checkpoint(config)
    machines = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, log_every=7),
        scaling=dataclasses.replace(config.scaling, workers="4"),
    )
    launch.begin_run(machines, fresh=False)  # other machines are no other run
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))
    with pytest.raises(UserError, match=r"optim\.lr 0\.003 instead of 0\.5"):
        launch.begin_run(other, fresh=False)


def test_a_run_without_a_checkpoint_gives_way_to_other_settings(tmp_path: Path) -> None:
    config = _config("--out", str(tmp_path))
    launch.begin_run(config, fresh=False)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))
    launch.begin_run(other, fresh=False)
    assert "lr: 0.5" in (tmp_path / "config.yaml").read_text()
    (tmp_path / "summary.json").write_text("{}")  # a finished run whose checkpoints were deleted
    with pytest.raises(UserError, match=r"optim\.lr 0\.5 instead of 0\.003"):
        launch.begin_run(config, fresh=False)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_refused_start_leaves_the_run_as_it_was(
    tmp_path: Path, shapes: str, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    monkeypatch.setattr(launch, "connect", lambda: None)  # the number of workers is looked at without a cluster
    config = _config("--data", shapes, "--out", str(tmp_path / "run"), "--workers", "3")
    for files in ([], [checkpoint.name(3)]):
        with pytest.raises(UserError, match=r"scaling\.workers 3 does not share the batch equally"):
            launch.launch(config, fresh=fresh)
        left = sorted(path.name for path in (tmp_path / "run").iterdir() if path.name != "lease")
        assert left == files
        _checkpoint(config) if not files else None


def test_a_dry_run_names_the_checkpoint_that_a_start_would_take(
    tmp_path: Path, shapes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "connect", lambda: None)
    monkeypatch.setattr(launch, "warn_of_local_places", lambda config: None)
    monkeypatch.setattr(launch.nodes, "grows", lambda: True)  # then no node is looked at
    config = _config("--data", shapes, "--out", str(tmp_path), "--workers", "1")
    launch.begin_run(config, fresh=False)
    for step in (3, 6):
        _checkpoint(config, step)
    newest = tmp_path / checkpoint.name(6) / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    launch.plan(config)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"it would start from {tmp_path / checkpoint.name(3)}; nothing was started"
    assert f"{newest}: damaged" in "".join(said)
    assert any(re.fullmatch(r"a step needs about 0\.\d GiB of memory on each worker", line) for line in said)
    assert newest.exists()
    with held(str(tmp_path), Patience(1)), pytest.raises(UserError, match=rf"{tmp_path} is being written by .* wait"):
        launch.plan(config)


def test_a_start_says_once_that_a_dataset_is_of_an_earlier_version(
    tmp_path: Path, shapes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "connect", lambda: None)
    monkeypatch.setattr(launch, "warn_of_local_places", lambda config: None)
    monkeypatch.setattr(launch.nodes, "grows", lambda: True)
    config = _config("--data", shapes, "--out", str(tmp_path), "--workers", "1")
    launch.plan(config)
    assert "earlier version" not in capsys.readouterr().out
    found = open_dataset(shapes)
    older = dataclasses.replace(found, index=found.index.select(OLDER_INDEX.names))
    monkeypatch.setattr(preflight, "open_dataset", lambda root: older)
    launch.plan(config)
    assert capsys.readouterr().out.count("prepare it again to read less") == 1
    balanced = _config("--data", shapes, "--out", str(tmp_path), "--workers", "1", "--data.balance", "0.5")
    with pytest.raises(UserError, match=r"^data.balance: .*/shapes was prepared by an older version.*prepare it again"):
        launch.plan(balanced)


def test_a_config_that_was_cut_off_is_damaged_not_another_run(tmp_path: Path) -> None:
    config = _config("--out", str(tmp_path))
    launch.begin_run(config, fresh=False)
    _checkpoint(config)
    file = tmp_path / "config.yaml"
    text = file.read_text()
    for half, why in (
        (text[: text.index("backbone")].encode(), r"model\.backbone is missing"),
        (text[: text.index("window:") + 7].encode(), r"eval\.window: expected 2 values"),
        (b"method: u2pl\n\xff", "no UTF-8 text"),
    ):
        file.write_bytes(half)
        with pytest.raises(UserError, match=rf"config\.yaml: damaged.*{why}.*delete the file"):
            launch.begin_run(config, fresh=False)


def test_without_its_file_a_run_keeps_the_settings_of_its_checkpoints(tmp_path: Path) -> None:
    config = _config("--out", str(tmp_path))
    _checkpoint(
        dataclasses.replace(config, data=dataclasses.replace(config.data, background="0"))
    )  # as the trainer does
    preflight.check_identity(config)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))
    with pytest.raises(UserError, match=r"holds a run with optim\.lr 0\.003 instead of 0\.5"):
        preflight.check_identity(other)


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
    _checkpoint(_config("--data", shapes, "--out", str(tmp_path), "--data.unlabeled_pools", "/a"))
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
