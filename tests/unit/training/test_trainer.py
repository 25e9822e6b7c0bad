"""The loop in one plain process; its numbers are compared in tests/parity."""

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint
from pipeline.batch import Batch
from pipeline.checkpoint import Score
from pipeline.config.cli import resolve
from pipeline.config.schema import Config, as_dict
from pipeline.errors import Diverged, UserError
from pipeline.methods import OPTIONS, Losses, Step
from pipeline.methods.suponly import SupOnly
from pipeline.models import vit
from pipeline.models.weights import digest
from pipeline.training import trainer
from pipeline.training.runtime import PlainRuntime
from tests.unit.ingest.loading import producing
from tests.unit.training.short_runs import Exploding, config_of, records, train

pytestmark = pytest.mark.usefixtures("small_validation_set")


def test_what_happens_when(shapes, tmp_path):
    progress = train(config_of(shapes, tmp_path))
    assert progress.step == 6
    assert progress.last is not None
    assert progress.last.step == 6
    assert [(r["kind"], r["step"]) for r in records(tmp_path)] == [
        ("train", 2), ("train", 4), ("eval", 4), ("train", 6), ("eval", 6),
    ]  # fmt: skip
    assert all(r["worker_seconds"] > 0 for r in records(tmp_path))
    meta = checkpoint.read_meta(f"{tmp_path}/{checkpoint.name(6)}")
    assert meta.config["data"]["background"] == "0", "the class that the dataset calls background"
    about = meta.about
    assert (about["dataset"], about["protocol"], about["labeled"], about["unlabeled"]) == ("shapes", "random", 100, 300)
    assert (about["workers"], about["device"], about["torch"]) == (1, "cpu", torch.__version__)
    folders = sorted(path.name for path in tmp_path.glob("step_*"))
    assert folders == [checkpoint.name(step) for step in (3, 4, 6)]
    assert all(r["images_per_second"] > 0 and r["eta_seconds"] >= 0 for r in records(tmp_path) if r["kind"] == "train")


def test_a_checkpoint_notes_the_digest_of_the_weights_after_a_resume_too(shapes, tmp_path):
    encoder = vit.ViT(vit.SIZES["vit_tiny"])
    torch.save(encoder.state_dict(), tmp_path / "vit.pth")
    model = {"backbone": "vit_tiny", "weights": str(tmp_path / "vit.pth")}
    config = config_of(shapes, tmp_path / "run", model=model, run={"pictures": 0})
    train(config)
    last = tmp_path / "run" / checkpoint.name(6)
    assert checkpoint.read_meta(str(last)).about["weights_digest"] == digest(encoder.state_dict())
    shutil.rmtree(last)
    (tmp_path / "vit.pth").unlink()
    train(config)
    assert checkpoint.read_meta(str(last)).about["weights_digest"] == digest(encoder.state_dict())


def test_it_says_what_comes_and_the_first_step(shapes, tmp_path, caplog):
    caplog.set_level(logging.INFO, "pipeline.training.trainer")
    config = config_of(shapes, tmp_path, method="u2pl", u2pl={"warmup": 3})
    train(config)
    said = [" ".join(message.split()) for message in caplog.messages if not re.search("val mIoU|stood still", message)]
    scratch = "encoder tiny: from scratch, no pretrained weights"
    assert said[:3] == [scratch, "learning from labels alone until step 3", "reading"]
    assert [line.partition("/")[0] for line in said[3:]] == ["step 1", "step 2", "step 4", "step 6"]
    assert ["eta" in line for line in said[3:]] == [False, True, True, True]
    steps = [record.step for record in caplog.records if hasattr(record, "step")]
    assert steps == [1, 2, 4, 6]


def test_convolutions_are_searched_for_where_images_have_one_size(shapes, tmp_path, monkeypatch):
    seen, forward, score = [], SupOnly.forward, trainer.evaluate

    def noted(kind: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            seen.append((kind, torch.backends.cudnn.benchmark))
            return function(*args)

        return run

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # and so again after the test
    monkeypatch.setattr(SupOnly, "forward", noted("step", forward))
    monkeypatch.setattr(trainer, "evaluate", noted("evaluate", score))
    train(config_of(shapes, tmp_path, optim={"steps": 2}, eval={"every": 1}))
    assert seen == [("step", True), ("evaluate", False)] * 2


def test_the_last_step_is_scored_and_saved_whatever_the_intervals(shapes, tmp_path):
    config = config_of(shapes, tmp_path, optim={"steps": 5}, run={"checkpoint_every": 100, "log_every": 100})
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=100))
    assert train(config).last is not None
    assert [(r["kind"], r["step"]) for r in records(tmp_path)] == [("train", 5), ("eval", 5)]
    assert checkpoint.newest(str(tmp_path)) == f"{tmp_path}/{checkpoint.name(5)}"


def test_without_a_better_score_for_so_long_it_ends(shapes, tmp_path, monkeypatch, caplog):
    """The scores are given here, as what happens after them is the matter: the best comes at step 4."""
    caplog.set_level(logging.INFO, "pipeline.training.trainer")
    scores = {2: 0.2, 4: 0.5, 6: 0.4, 8: 0.5, 10: 0.3, 12: 0.6}

    def scored(own: trainer.Trainer, tracker: Any) -> None:
        own.progress.scored(Score(own.progress.step, {"student": scores[own.progress.step]}, []))

    monkeypatch.setattr(trainer.Trainer, "evaluate", scored)
    config = config_of(shapes, tmp_path, optim={"steps": 12}, eval={"every": 2, "patience": 3}, run={"pictures": 0})
    progress = train(config)
    assert progress.best is not None
    assert (progress.step, progress.best.step) == (10, 4)
    assert checkpoint.newest(str(tmp_path)) == f"{tmp_path}/{checkpoint.name(10)}"
    assert "no better mIoU in 3 evaluations (eval.patience): ending early" in caplog.messages
    noted = records(tmp_path)
    assert train(config) == progress, "killed before its summary was written, it has ended all the same"
    assert records(tmp_path) == noted
    patient = dataclasses.replace(config, eval=dataclasses.replace(config.eval, patience=4))
    assert train(patient).step == 12


def test_a_finished_run_trains_no_further(shapes, tmp_path):
    config = config_of(shapes, tmp_path)
    first, files = train(config), (tmp_path / "metrics.jsonl").read_text()
    assert train(config) == first
    assert (tmp_path / "metrics.jsonl").read_text() == files


def test_a_bad_step_is_named_and_never_becomes_a_checkpoint(shapes, tmp_path, monkeypatch):
    """The checkpoint of step 3 lies between two log lines."""
    monkeypatch.setattr(trainer, "build_method", lambda config, classes: Exploding(config, classes))
    config = config_of(shapes, tmp_path, run={"log_every": 100, "checkpoint_every": 1})
    with pytest.raises(Diverged, match=r"not finite at step 2; this rank's samples: shape_\d+, shape_\d+$"):
        train(config)
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
    config = config_of(shapes, tmp_path, optim={"steps": 3}, run={"checkpoint_every": checkpoint_every})
    with pytest.raises(
        Diverged, match=r"^student\.\S+ .*not finite after step 2; this rank's samples: shape_\d+, shape_\d+$"
    ):
        train(config)
    last = checkpoint.newest(str(tmp_path))
    assert last == (f"{tmp_path}/{checkpoint.name(2)}" if checkpoint_every == 1 else None)


class _Overflowing(SupOnly):
    """Finite losses, and gradients of infinity at some steps."""

    bad = (2, 4)

    def forward(self, batch: Batch, step: Step) -> Losses:
        losses = super().forward(batch, step)
        if step.index in self.bad:
            weight = next(iter(self.student.parameters())).flatten()[0]
            losses.terms["supervised"] = losses.terms["supervised"] + (weight - weight.detach()).abs().sqrt()
        return losses


def test_updates_with_an_infinite_gradient_are_left_out(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "build_method", lambda config, classes: _Overflowing(config, classes))
    run, states = {"log_every": 3, "checkpoint_every": 1}, {}
    train(config_of(shapes, tmp_path, optim={"steps": 6, "nonfinite": "skip"}, run=run))
    for step in range(1, 7):
        states[step] = checkpoint.read_state(f"{tmp_path}/{checkpoint.name(step)}")["method"]
    weights = [name for name, value in states[1].items() if "running" not in name and value.is_floating_point()]
    same = [step for step in range(2, 7) if all(states[step][w].equal(states[step - 1][w]) for w in weights)]
    assert same == [3, 5]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record.get("updates_left_out") for record in records if record["kind"] == "train"] == [1, 1]
    assert all(record["total"] > 0 for record in records if record["kind"] == "train")


def test_an_infinite_gradient_stops_the_run_by_default(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "build_method", lambda config, classes: _Overflowing(config, classes))
    with pytest.raises(Diverged, match=r"not finite (after|at) step"):
        train(config_of(shapes, tmp_path, optim={"steps": 6}))


def test_gradients_that_stay_infinite_end_the_run(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "build_method", lambda config, classes: _Overflowing(config, classes))
    monkeypatch.setattr(_Overflowing, "bad", range(2, 100))
    with pytest.raises(
        Diverged, match=r"gradients of 20 steps in a row, up to step 21, are not finite; this rank's samp"
    ):
        train(config_of(shapes, tmp_path, optim={"steps": 40, "nonfinite": "skip"}))


HALF = {"precision": "fp16", "log_every": 1, "checkpoint_every": 1}


def _scales(out: Path, steps: range) -> list[float]:
    return [checkpoint.read_state(f"{out}/{checkpoint.name(step)}")["scaler"]["scale"] for step in steps]


def test_in_float16_a_scale_that_is_too_large_is_halved_and_the_update_left_out(shapes, tmp_path, monkeypatch):
    """By `stop`, too, and the scale goes on from the checkpoint."""
    monkeypatch.setattr(trainer, "build_method", lambda config, classes: _Overflowing(config, classes))
    config = config_of(shapes, tmp_path / "a", optim={"steps": 6}, run=HALF)
    train(config)
    assert _scales(tmp_path / "a", range(1, 7)) == [65536.0, 65536.0, 32768.0, 32768.0, 16384.0, 16384.0]
    (tmp_path / "b").mkdir()
    for step in (1, 2, 3):
        shutil.copytree(tmp_path / "a" / checkpoint.name(step), tmp_path / "b" / checkpoint.name(step))
    train(dataclasses.replace(config, out=str(tmp_path / "b")))
    one, other = (checkpoint.read_state(f"{tmp_path}/{run}/{checkpoint.name(6)}") for run in ("a", "b"))
    assert _leaves(one) == _leaves(other)


def test_in_float16_a_loss_that_is_not_finite_stops_the_run(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "build_method", lambda config, classes: Exploding(config, classes))
    with pytest.raises(Diverged, match=r"not finite at step 2; this rank's samples"):
        train(config_of(shapes, tmp_path, run=HALF))


def test_a_run_may_go_on_in_float16(shapes, tmp_path):
    config = config_of(shapes, tmp_path, run={"checkpoint_every": 3})
    train(config)
    assert "scaler" not in checkpoint.read_state(f"{tmp_path}/{checkpoint.name(4)}")
    shutil.rmtree(tmp_path / checkpoint.name(6))
    half = dataclasses.replace(config, run=dataclasses.replace(config.run, precision="fp16"))
    train(half)
    assert checkpoint.read_state(f"{tmp_path}/{checkpoint.name(6)}")["scaler"]["scale"] == 65536.0


def test_other_data_is_refused(shapes, tmp_path):
    config = config_of(shapes, tmp_path, optim={"steps": 2})
    train(config)
    with pytest.raises(UserError, match=r"was trained on other images or another split; use --fresh"):
        train(dataclasses.replace(config, split="1_8"))


def test_other_pools_are_refused(shapes, tmp_path):
    """A prepared dataset serves as a pool here; its masks play no part."""

    def config(**data: Any) -> Config:
        return config_of(shapes, tmp_path, "mean_teacher", data=data, optim={"steps": 2})

    train(config(unlabeled_pools=[shapes]))
    pools = checkpoint.read_meta(checkpoint.find(str(tmp_path))).data["pools"]
    assert [generations for _, generations in pools] == [1]
    assert train(config(unlabeled_pools=[shapes])).step == 2
    with pytest.raises(UserError, match=r"was trained on other images or another split; use --fresh"):
        train(config())


def test_the_threads_end_with_the_run(shapes, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(
        trainer.Loader, "close", lambda self, close=trainer.Loader.close: (close(self), closed.append(self))
    )
    train(config_of(shapes, tmp_path / "a"))
    monkeypatch.setattr(trainer, "build_method", lambda config, classes: Exploding(config, classes))
    with pytest.raises(Diverged):
        train(config_of(shapes, tmp_path / "b"))
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
    train(config_of(shapes, tmp_path, optim={"clip_norm": 0.01, "steps": 2}))
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    train(config_of(shapes, tmp_path / "free", optim={"steps": 1}))
    assert norms[-1] > 0.1


def test_dropout_is_seeded_by_step_and_rank():
    draws = []
    for key in [(0, 1, 0), (0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)]:
        trainer.seed_step(*key)
        draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4


@pytest.mark.parametrize("works", [True, False])
def test_a_network_is_compiled_for_steps_or_the_run_goes_on_without(shapes, tmp_path, monkeypatch, caplog, works):
    """The compiler gives the graph back as it is, to save time, or fails; the numbers are those of a plain run."""
    graphs = []

    def compiler(graph: Any, *_: Any, **__: Any) -> Any:
        graphs.append(graph)
        if not works:
            raise RuntimeError("no such kernel")
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compiler)
    torch._dynamo.reset()
    for name, compiled in (("plain", False), ("compiled", True)):
        assert not graphs
        train(config_of(shapes, tmp_path / name, optim={"steps": 2}, run={"compile_network": compiled}))
    torch._dynamo.reset()
    states = [checkpoint.read_state(f"{tmp_path}/{name}/{checkpoint.name(2)}") for name in ("plain", "compiled")]
    torch.testing.assert_close(states[1]["method"], states[0]["method"], rtol=1e-4, atol=1e-6)
    line = "run.compile_network: no such kernel; the network runs uncompiled, right but slower"
    assert (line in caplog.messages) is not works
    assert (len(graphs) > 5) is works


DRAWN = {"eval": {"every": 2}, "run": {"checkpoint_every": 2, "pictures": 3, "tensorboard": True}}
U2PL = {"u2pl": {"warmup": 1, "anchors": 8, "negatives": 4, "keys": 8, "queue": 20, "queue_background": 20}}


def _drawn(shapes: str, out: Path, **run: Any) -> Config:
    """A run of U2PL that is evaluated, and drawn, at every second step."""
    sections = {**DRAWN, "run": {**DRAWN["run"], **run}}
    config = config_of(shapes, out, "u2pl", **sections)
    return resolve({**as_dict(config), **U2PL}, OPTIONS)


def test_pictures_change_no_bit_of_the_training(shapes, tmp_path):
    plain, drawn = (_drawn(shapes, tmp_path / name, pictures=count) for name, count in (("plain", 0), ("drawn", 3)))
    assert train(plain) == train(drawn)
    names = ["step_0000002.png", "step_0000004.png", "step_0000006.png"]
    assert sorted(path.name for path in (tmp_path / "drawn/pictures").iterdir()) == names
    assert not (tmp_path / "plain/pictures").exists()
    for step in (2, 4, 6):
        one, other = (checkpoint.read_state(f"{tmp_path}/{run}/{checkpoint.name(step)}") for run in ("plain", "drawn"))
        assert _leaves(one.pop("method")) == _leaves(other.pop("method"))
        assert _leaves(one.pop("optimizer")) == _leaves(other.pop("optimizer"))
        assert one == other


def _leaves(state: Any) -> Any:
    """Nested state with tensors as bytes, which compare bit for bit."""
    if isinstance(state, torch.Tensor):
        return state.dtype, tuple(state.shape), state.contiguous().numpy().tobytes()
    if isinstance(state, dict):
        return {key: _leaves(value) for key, value in state.items()}
    return [_leaves(value) for value in state] if isinstance(state, list | tuple) else state


def test_pictures_of_a_resumed_run_are_those_of_one_that_never_stopped(shapes, tmp_path, monkeypatch):
    """It is lost after it has drawn step 4 and before that step's checkpoint; what it drew there was damaged."""
    train(_drawn(shapes, tmp_path / "whole"))
    lost, save = tmp_path / "lost", trainer.Trainer.save

    def dies(self: trainer.Trainer, scored: bool) -> None:
        if self.progress.step == 4:
            raise KeyboardInterrupt
        save(self, scored)

    monkeypatch.setattr(trainer.Trainer, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        train(_drawn(shapes, lost))
    monkeypatch.setattr(trainer.Trainer, "save", save)
    assert sorted(path.name for path in (lost / "pictures").iterdir()) == ["step_0000002.png", "step_0000004.png"]
    (lost / "pictures/step_0000004.png").write_bytes(b"half")
    (lost / "pictures/step_0000005.png").write_bytes(b"of an attempt with other intervals")
    train(_drawn(shapes, lost))
    one, other = ({p.name: p.read_bytes() for p in (out / "pictures").iterdir()} for out in (tmp_path / "whole", lost))
    assert one == other
    assert len(one) == 3
    events = [sorted(p.name for p in (tmp_path / run / "tensorboard/pictures").iterdir()) for run in ("whole", "lost")]
    assert events[0] == events[1] == [f"step_{step:07d}.tfevents" for step in (2, 4, 6)]


def test_pictures_are_read_with_the_patience_of_the_run(shapes, tmp_path, monkeypatch):
    read, given = trainer.read_images, []

    def watched(dataset: Any, ids: Any, patience: Any) -> Any:
        given.append((list(ids), patience))
        return read(dataset, ids, patience)

    monkeypatch.setattr(trainer, "read_images", watched)
    config = _drawn(shapes, tmp_path)
    runtime = PlainRuntime(str(config.out))
    trainer.train(config, runtime)
    assert [patience is runtime.patience for _, patience in given] == [True] * 3
    assert given[0][0] == given[1][0] == given[2][0]
    assert len(set(given[0][0])) == 3
