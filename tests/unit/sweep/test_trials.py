from typing import Any

import pytest
from PIL import Image

from pipeline import checkpoint, storage
from pipeline.config import cli
from pipeline.config.schema import to_yaml
from pipeline.datasets.pools import make
from pipeline.datasets.pools.make import make_pool
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.sweep.trials import make_trials, parse_grid


def _base(shapes: str, out: object, *flags: str) -> dict[str, Any]:
    return cli.parse_values(["--preset", "demo", "--data", shapes, "--out", str(out), *flags], "", OPTIONS)[0]


def test_every_combination_once(shapes, tmp_path):
    trials = make_trials(_base(shapes, tmp_path, "--seed", "3"), ["suponly", "u2pl"], ["1_8", "1_4"], 2, {})
    assert [trial.name for trial in trials] == [
        f"{method}-{split}-s{seed}" for method in ("suponly", "u2pl") for split in ("1_8", "1_4") for seed in (3, 4)
    ]
    assert len({trial.out for trial in trials}) == 8
    for trial in trials:
        assert trial.out == f"{tmp_path}/trials/{trial.name}"
        assert trial.name == f"{trial.config.method}-{trial.config.split}-s{trial.config.seed}"
        assert trial.steps() == 0
        assert trial.finished() is None
    assert storage.list_files(str(tmp_path)) == []  # nothing has begun


def test_a_grid_varies_what_reads_it(shapes, tmp_path):
    grid = parse_grid(["ablation_loss", "optim.lr=0.01,0.02"])
    assert grid == {"u2pl.loss": ("contrastive", "binary"), "optim.lr": ("0.01", "0.02")}
    trials = make_trials(_base(shapes, tmp_path), ["suponly", "u2pl", "u2pl_ael"], ["1_8"], 1, grid)
    found = {trial.name: trial.config for trial in trials}
    assert len(found) == 2 + 4 + 4
    assert {name.split("-")[0] for name in found if "u2pl.loss" in name} == {"u2pl", "u2pl_ael"}
    assert {name: config.optim.lr for name, config in found.items() if name.startswith("suponly")} == {
        "suponly-1_8-s0-optim.lr-0.01": 0.01,
        "suponly-1_8-s0-optim.lr-0.02": 0.02,
    }
    assert found["u2pl-1_8-s0-u2pl.loss-binary-optim.lr-0.02"].options["u2pl"].loss == "binary"
    names = {"ablation_reliability": ("unreliable", "reliable", "all")}
    assert parse_grid(["ablation_reliability"]) == {"u2pl.negative_pixels": names["ablation_reliability"]}


@pytest.mark.parametrize("text", ["foo", "optim.lr=", "=1"])
def test_a_grid_that_is_none(text):
    with pytest.raises(UserError, match="--grid"):
        make_trials({}, ["suponly"], ["1_8"], 1, parse_grid([text]))


def test_a_key_twice():
    with pytest.raises(UserError, match="twice"):
        parse_grid(["u2pl.loss=binary", "ablation_loss"])


@pytest.mark.parametrize(
    ("methods", "splits", "grid", "words"),
    [
        (["u2pk"], ["1_8"], {}, "unknown method 'u2pk'"),
        (["u2pl"], ["1_7"], {}, "no split '1_7'"),
        (["u2pl"], ["1_8"], {"u2pl.los": ("a",)}, "did you mean loss"),
        (["u2pl"], ["1_8"], {"u2pl.loss": ("a",)}, "choose from contrastive, binary"),
        (["u2pl"], ["1_8"], {"optim.batch_labeled": ("4", "400")}, "fewer than optim.batch_labeled"),
        ([], ["1_8"], {}, "at least one"),
        (["u2pl", "u2pl"], ["1_8"], {}, "--methods: u2pl,u2pl names one twice"),
        (["u2pl"], ["1_8", "1_8"], {}, "--splits: 1_8,1_8 names one twice"),
        (["u2pl"], ["1_8"], {"optim.lr": ("0.1", "0.1")}, r"--grid optim\.lr: 0\.1,0\.1 names one twice"),
        (["suponly"], ["1_8"], {"u2pl.loss": ("binary",)}, r"--grid u2pl\.loss: none of the methods suponly reads it"),
    ],
)
def test_mistakes_show_before_anything_starts(shapes, tmp_path, methods, splits, grid, words):
    with pytest.raises(UserError, match=words):
        make_trials(_base(shapes, tmp_path), methods, splits, 1, grid)
    assert storage.list_files(str(tmp_path)) == []


def test_places_that_a_grid_names_are_absolute(shapes, tmp_path, monkeypatch):
    """A trial runs in another directory than the one it was started from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").touch()
    (trial,) = make_trials(_base(shapes, tmp_path), ["suponly"], ["1_8"], 1, {"model.weights": ("a.pth",)})
    assert trial.config.model.weights == str(tmp_path / "a.pth")


def test_all_trials_see_the_same_generations_of_a_pool_that_grows(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(make.tasks, "run", lambda task, items, *_: map(task, items))
    pool, photos = str(tmp_path / "pool"), tmp_path / "photos"
    _add(photos, range(20))
    make_pool("images", str(photos), pool)
    flags = ["--data.unlabeled_pools", pool, "--data.pool_weights", "1", "1"]
    trials = make_trials(_base(shapes, tmp_path, *flags), ["suponly", "u2pl"], ["1_8"], 2, {})
    assert [trial.config.data.pool_generations for trial in trials] == [(), (), (1,), (1,)]
    begun = trials[3]
    _begin(begun)
    _add(photos, range(20, 40))
    make_pool("images", str(photos), pool, append=True)
    again = make_trials(_base(shapes, tmp_path, *flags), ["suponly", "u2pl", "cps"], ["1_8"], 2, {})
    assert [trial.config.data.pool_generations for trial in again] == [(), (), (1,), (1,), (1,), (1,)]
    for trial in again:
        _begin(trial)
    third = make_trials(_base(shapes, tmp_path, *flags), ["suponly", "u2pl", "cps"], ["1_8"], 2, {})
    assert [trial.config for trial in third] == [trial.config for trial in again]
    (other,) = make_trials(_base(shapes, tmp_path / "else", *flags), ["u2pl"], ["1_8"], 1, {})
    assert other.config.data.pool_generations == (2,)


def _begin(trial):
    storage.write_bytes(f"{trial.out}/config.yaml", to_yaml(trial.config).encode())


def _add(folder, numbers):
    folder.mkdir(exist_ok=True)
    for number in numbers:
        Image.new("RGB", (96, 96), (number, 0, 0)).save(folder / f"{number}.png")


def test_another_sweep_in_the_same_place_is_refused(shapes, tmp_path):
    (trial,) = make_trials(_base(shapes, tmp_path), ["suponly"], ["1_8"], 1, {})
    _begin(trial)
    storage.write_bytes(f"{trial.out}/{checkpoint.name(3)}/{checkpoint.META_FILE}", b"{}")
    assert make_trials(_base(shapes, tmp_path), ["suponly"], ["1_8"], 1, {})[0].name == trial.name
    with pytest.raises(UserError, match=r"holds a run with optim\.steps 900 instead of 30"):
        make_trials(_base(shapes, tmp_path, "--optim.steps", "30"), ["suponly"], ["1_8"], 1, {})


def test_self_training_is_a_recipe_whose_student_counts(shapes, tmp_path):
    (trial,) = make_trials(_base(shapes, tmp_path), ["self_training"], ["1_8"], 1, {})
    assert trial.staged
    assert trial.out == f"{tmp_path}/trials/self_training-1_8-s0/student"
    (plain,) = make_trials(_base(shapes, tmp_path), ["suponly"], ["1_8"], 1, {})
    assert not plain.staged
    with pytest.raises(UserError, match="leave the pools out"):
        make_trials(_base(shapes, tmp_path, "--data.unlabeled_pools", shapes), ["self_training"], ["1_8"], 1, {})
