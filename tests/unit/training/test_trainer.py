"""The loop in one plain process; its numbers are compared in tests/parity."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint
from pipeline.batch import Batch
from pipeline.config.cli import resolve
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.methods import OPTIONS, Losses, Step
from pipeline.methods.suponly import SupOnly
from pipeline.training import trainer
from pipeline.training.meter import Diverged
from pipeline.training.runtime import PlainRuntime
from tests.unit.ingest.loading import producing


@pytest.fixture(autouse=True)
def _small_validation_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is scored is not the matter here: one row group is enough."""
    from pipeline.inference import evaluate

    groups = evaluate.val_groups
    monkeypatch.setattr(evaluate, "val_groups", lambda dataset: groups(dataset)[:1])


def _config(root: str, out: Path, method: str = "suponly", **sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "data": {"root": root, "crop": [32, 32]},
        "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8},
        "optim": {"steps": 6, "batch_labeled": 2, "batch_unlabeled": 2},
        "eval": {"every": 4},
        "run": {"log_every": 2, "checkpoint_every": 3, "tensorboard": False},
    }
    for name, section in sections.items():
        values[name] |= section
    return resolve({"method": method, "split": "1_4", "out": str(out), **values}, OPTIONS)


def _train(config: Config) -> checkpoint.Progress:
    return trainer.train(config, PlainRuntime(str(config.out)))


def _records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_what_happens_when(shapes, tmp_path):
    progress = _train(_config(shapes, tmp_path))
    assert progress.step == 6
    assert progress.last is not None
    assert progress.last.step == 6
    assert [(r["kind"], r["step"]) for r in _records(tmp_path)] == [
        ("train", 2), ("train", 4), ("eval", 4), ("train", 6), ("eval", 6),
    ]  # fmt: skip
    assert all(r["worker_seconds"] > 0 for r in _records(tmp_path))
    meta = checkpoint.read_meta(f"{tmp_path}/{checkpoint.name(6)}")
    assert meta.config["data"]["background"] == "0", "the class that the dataset calls background"
    about = meta.about
    assert (about["dataset"], about["protocol"], about["labeled"], about["unlabeled"]) == ("shapes", "random", 100, 300)
    assert (about["workers"], about["device"], about["torch"]) == (1, "cpu", torch.__version__)
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == [checkpoint.name(step) for step in (3, 4, 6)]
    assert all(r["images_per_second"] > 0 and r["eta_seconds"] >= 0 for r in _records(tmp_path) if r["kind"] == "train")


def test_the_last_step_is_scored_and_saved_whatever_the_intervals(shapes, tmp_path):
    config = _config(shapes, tmp_path, optim={"steps": 5}, run={"checkpoint_every": 100, "log_every": 100})
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=100))
    assert _train(config).last is not None
    assert [(r["kind"], r["step"]) for r in _records(tmp_path)] == [("train", 5), ("eval", 5)]
    assert checkpoint.newest(str(tmp_path)) == f"{tmp_path}/{checkpoint.name(5)}"


def test_a_finished_run_trains_no_further(shapes, tmp_path):
    config = _config(shapes, tmp_path)
    first, files = _train(config), (tmp_path / "metrics.jsonl").read_text()
    assert _train(config) == first
    assert (tmp_path / "metrics.jsonl").read_text() == files


class _Exploding(SupOnly):
    """Not finite at step 2."""

    def forward(self, batch: Batch, step: Step) -> Losses:
        losses = super().forward(batch, step)
        worse = float("nan") if step.index == 2 else 1.0
        return Losses({name: value * worse for name, value in losses.terms.items()}, losses.logs)


def test_a_bad_step_is_named_and_never_becomes_a_checkpoint(shapes, tmp_path, monkeypatch):
    """The checkpoint of step 3 lies between two log lines."""
    monkeypatch.setattr(trainer, "build_method", lambda config, classes: _Exploding(config, classes))
    config = _config(shapes, tmp_path, run={"log_every": 100, "checkpoint_every": 1})
    with pytest.raises(Diverged, match=r"not finite at step 2; this rank's samples: shape_\d+, shape_\d+$"):
        _train(config)
    place = f"{tmp_path}/{checkpoint.name(2)}"
    assert checkpoint.newest(str(tmp_path)) == place
    state = checkpoint.read_state(place)["method"]
    assert all(value.isfinite().all() for value in state.values())


class _Spoilt(SupOnly):
    """Finite losses throughout; the update of step 2 makes a weight infinite."""

    def after_step(self, step: Step) -> None:
        super().after_step(step)
        if step.index == 2:
            with torch.no_grad():
                next(iter(self.student.parameters())).mul_(torch.inf)


@pytest.mark.parametrize("checkpoint_every", [1, 100])
def test_what_an_update_spoils_never_becomes_a_checkpoint_or_a_result(shapes, tmp_path, monkeypatch, checkpoint_every):
    monkeypatch.setattr(trainer, "build_method", lambda config, classes: _Spoilt(config, classes))
    config = _config(shapes, tmp_path, optim={"steps": 3}, run={"checkpoint_every": checkpoint_every})
    with pytest.raises(
        Diverged, match=r"^student\.\S+ .*not finite after step 2; this rank's samples: shape_\d+, shape_\d+$"
    ):
        _train(config)
    last = checkpoint.newest(str(tmp_path))
    assert last == (f"{tmp_path}/{checkpoint.name(2)}" if checkpoint_every == 1 else None)


def test_other_data_is_refused(shapes, tmp_path):
    config = _config(shapes, tmp_path, optim={"steps": 2})
    _train(config)
    with pytest.raises(UserError, match=r"was trained on other images or another split; use --fresh"):
        _train(dataclasses.replace(config, split="1_8"))


def test_other_pools_are_refused(shapes, tmp_path):
    """A prepared dataset serves as a pool here; its masks play no part."""

    def config(**data: Any) -> Config:
        return _config(shapes, tmp_path, "mean_teacher", data=data, optim={"steps": 2})

    _train(config(unlabeled_pools=[shapes]))
    pools = checkpoint.read_meta(checkpoint.find(str(tmp_path))).data["pools"]
    assert [generations for _, generations in pools] == [1]
    assert _train(config(unlabeled_pools=[shapes])).step == 2
    with pytest.raises(UserError, match=r"was trained on other images or another split; use --fresh"):
        _train(config())


def test_the_threads_end_with_the_run(shapes, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(
        trainer.Loader, "close", lambda self, close=trainer.Loader.close: (close(self), closed.append(self))
    )
    _train(_config(shapes, tmp_path / "a"))
    monkeypatch.setattr(trainer, "build_method", lambda config, classes: _Exploding(config, classes))
    with pytest.raises(Diverged):
        _train(_config(shapes, tmp_path / "b"))
    assert len(closed) == 2
    assert not producing()


def test_clipping_limits_the_gradient(shapes, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *rest: Any) -> Any:
        squares = [p.grad.square().sum() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack(squares).sum().sqrt()))
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    _train(_config(shapes, tmp_path, optim={"clip_norm": 0.01, "steps": 2}))
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    _train(_config(shapes, tmp_path / "free", optim={"steps": 1}))
    assert norms[-1] > 0.1


def test_dropout_is_seeded_by_step_and_rank():
    draws = []
    for key in [(0, 1, 0), (0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)]:
        trainer.seed_step(*key)
        draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4
