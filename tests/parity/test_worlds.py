"""The number of workers and an interruption change nothing: the real loop on the demo dataset with the tiny network."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pipeline import checkpoint
from pipeline.batch import Batch
from pipeline.config.cli import resolve
from pipeline.config.methods import OPTIONS, SPECS
from pipeline.config.schema import Config, as_dict
from pipeline.ingest.loader import Loader
from pipeline.methods import METHODS, Method, build_method
from pipeline.training import trainer
from pipeline.training.runtime import Agreement, PlainRuntime

STEPS = 14
COMPARED = 7
"""Steps over which one and two workers are held against each other; rounding errors grow with each."""
WARMUP = 2
VITS = {"unimatch_v2_vit": "unimatch_v2", "u2pl_vit": "u2pl"}
"""Runs with a transformer, and their methods."""
COMPARABLE = (*METHODS, *VITS, "accumulated")
RUNS = (*COMPARABLE, "contrast")
"""Every method; `u2pl` is without L_c, `contrast` with: its draws, and so its losses, are per worker. `accumulated`
is `u2pl` in two micro-batches."""

ROUGH = {"suponly": 1e-4, "cct": 2e-2}
"""How far losses may drift apart after three steps: sums in another order flip hard labels of undecided pixels, and
what CCT's thresholds cut off."""
SEEDS = {"pseudoseg": 2}
"""Seeds other than 0: with it, a change of the weights by 3e-7 grows 250-fold in PseudoSeg's third step, alone and with
two workers alike; with this one it stays at 1e-7."""


def _config(root: str, labels: str, out: Path, method: str, backbone: str = "tiny", **u2pl: Any) -> Config:
    options = {"warmup": WARMUP, "anchors": 16, "negatives": 8, "keys": 16, "queue": 40, "queue_background": 40}
    return resolve(
        {
            "method": method,
            "seed": SEEDS.get(method, 0),
            "split": "1_4",
            "out": str(out),
            "data": {"root": root, "crop": [48, 48], "scale": [0.6, 1.3], **_labels(method, labels)},
            "model": {"backbone": backbone, "weights": "none", "feature_dim": 16},
            "optim": {"lr": 0.02, "head_lr_mult": 1, "steps": STEPS, "batch_labeled": 4, "batch_unlabeled": 4},
            "eval": {"every": COMPARED},
            "run": {"log_every": 1, "checkpoint_every": 1000, "tensorboard": False},
            "u2pl": {**options, "mix_share": 1.0, **u2pl},
            "mean_teacher": {"ramp": 0},
            "gct": {"detector_width": 8},
            **{name: {"threshold": 0.0} for name in ("cutmix_seg", "ael", "fixmatch", "unimatch", "unimatch_v2")},
        },
        OPTIONS,
    )


def _labels(method: str, labels: str) -> dict[str, str]:
    return {"pseudo_labels": labels} if SPECS[method].views.pseudo else {}


def _configs(root: str, labels: str, out: Path) -> dict[str, Config]:
    accumulated = _config(root, labels, out / "accumulated", "u2pl", lambda_c=0.0)
    return {
        **{name: _config(root, labels, out / name, name, lambda_c=0.0) for name in METHODS},
        **{name: _config(root, labels, out / name, method, "vit_tiny", lambda_c=0.0) for name, method in VITS.items()},
        "accumulated": replace(accumulated, optim=replace(accumulated.optim, accumulate=2)),
        "contrast": _config(root, labels, out / "contrast", "u2pl", lambda_c=0.1),
    }


class _Watch:
    """Runs the loop and keeps what it does not return: the ids of each step and the method."""

    def __init__(self, config: Config) -> None:
        self.ids: list[dict[str, tuple[str, ...]]] = []
        self.methods: list[Method] = []
        self._build = trainer.build_method
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "build_method", self._built)
            patch.setattr(trainer, "Loader", self._watched())
            trainer.train(config, PlainRuntime(str(config.out)))
        self.state = {name: value.clone() for name, value in self.methods[0].state_dict().items()}

    def _built(self, config: Config, num_classes: int) -> Method:
        self.methods.append(self._build(config, num_classes))
        return self.methods[-1]

    def _watched(self) -> Callable[..., Loader]:
        ids = self.ids

        class Watched(Loader):
            def __iter__(self) -> Iterator[Batch]:
                for batch in super().__iter__():
                    sides = {"labeled": batch.labeled, "unlabeled": batch.unlabeled}
                    ids.append({name: side.ids for name, side in sides.items() if side})
                    yield batch

        return Watched


def _worker(rank: int, store: str, configs: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    runs = {name: _Watch(resolve(values, OPTIONS)) for name, values in configs.items()}
    torch.save({name: {"ids": run.ids, "state": run.state} for name, run in runs.items()}, f"{store}.{rank}")
    for run in runs.values():
        _check_storage(run.methods[0])
    agreement = Agreement()  # only rank 0 wants something, at its third step
    assert [agreement.greatest(2 if rank == 0 and step == 2 else 0) for step in range(5)] == [0, 0, 0, 2, 0]
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(
    shapes: str, pseudo_labels: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Every run with two workers: where they wrote, and what each rank saw."""
    out = tmp_path_factory.mktemp("two")
    store = str(out / "store")
    configs = {name: as_dict(config) for name, config in _configs(shapes, pseudo_labels, out).items()}
    mp.spawn(_worker, (store, configs), nprocs=2)  # type: ignore[attr-defined]
    return out, [torch.load(f"{store}.{rank}", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one_rank(
    shapes: str, pseudo_labels: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, _Watch]]:
    """Every run in this process alone."""
    out = tmp_path_factory.mktemp("one")
    return out, {name: _Watch(config) for name, config in _configs(shapes, pseudo_labels, out).items()}


def _records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("name", COMPARABLE)
def test_two_workers_have_the_losses_of_one(name, one_rank, two_ranks):
    alone, shared = (_records(out / name, "train") for out in (one_rank[0], two_ranks[0]))
    assert len(alone) == len(shared) == STEPS
    for one, two in zip(alone[:COMPARED], shared[:COMPARED], strict=True):
        close = 1e-4 if one["step"] <= 3 else ROUGH.get(name, 1e-3)
        assert two["loss"] == pytest.approx(one["loss"], abs=close), f"step {one['step']}"
    if name == "u2pl":
        assert alone[WARMUP - 1]["loss"].keys() == {"supervised"}
        assert alone[WARMUP]["loss"]["unsupervised"] > 0
    (one, *_), (two, *_) = (_records(out / name, "eval") for out in (one_rank[0], two_ranks[0]))
    assert one["step"] == two["step"] == COMPARED
    assert two["miou"] == pytest.approx(one["miou"], abs=2e-3)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", COMPARABLE)
def test_it_learns_with_any_number_of_workers(name, workers, one_rank, two_ranks):
    records = _records((one_rank[0], two_ranks[0])[workers - 1] / name, "train")
    assert all(math.isfinite(value) for record in records for value in record["loss"].values())
    supervised = [_supervised(record["loss"]) for record in records]
    assert sum(supervised[-5:]) < 0.9 * sum(supervised[:5])


def _supervised(loss: dict[str, float]) -> float:
    """What is learned from labeled images, by one network or by two."""
    return sum(value for name, value in loss.items() if name.startswith("supervised"))


@pytest.mark.parametrize("name", RUNS)
def test_two_workers_see_the_global_batches_of_one(name, one_rank, two_ranks):
    alone, ranks = one_rank[1][name].ids, [rank[name]["ids"] for rank in two_ranks[1]]
    assert len(alone) == STEPS
    for one, first, second in zip(alone, *ranks, strict=True):
        assert one.keys() == first.keys() == second.keys()
        for side in one:
            assert one[side] == first[side] + second[side]
    assert len({step["labeled"] for step in alone}) > 1


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_end_in_one_state(name, two_ranks):
    """Parameters, batch statistics, teacher and memory bank, bit for bit: rank 0 alone writes checkpoints."""
    first, second = (rank[name]["state"] for rank in two_ranks[1])
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    if name == "contrast":
        assert (first["bank.count"] > 0).any()


def test_the_contrastive_term_reaches_the_student(one_rank):
    with_term, without = (one_rank[1][name].state for name in ("contrast", "u2pl"))
    key = "student.decoder.representation.1.weight"
    assert not torch.equal(with_term[key], without[key])


@pytest.mark.parametrize("name", RUNS)
def test_no_network_shares_storage_with_another(name, one_rank):
    _check_storage(one_rank[1][name].methods[0])


def _check_storage(method: Method) -> None:
    used: dict[int, str] = {}
    for name, network in method.networks().items():
        for key, value in [*network.named_parameters(), *network.named_buffers()]:
            place = value.untyped_storage().data_ptr()
            assert place not in used, f"{name}.{key} shares storage with {used[place]}"
            used[place] = f"{name}.{key}"


# ---- resume ---------------------------------------------------------------------------------------------------


LOST, END = 5, 8
"""The step after which the machine is lost, and the last one."""


class _Lost(Exception):
    """The machine goes away."""


class _Losing(PlainRuntime):
    """Loses the machine right after the checkpoint of a step."""

    def __init__(self, out: str, step: int) -> None:
        super().__init__(out)
        self._step = step

    def report(self, step: int, score: float | None, write: Callable[[Path], None] | None) -> None:
        super().report(step, score, write)
        if step == self._step:
            raise _Lost


def _with_dropout(config: Config, num_classes: int) -> Method:
    """Dropout as the larger networks have it: its random numbers must survive too."""
    method = build_method(config, num_classes)
    for network in method.networks().values():
        network.decoder.low = nn.Sequential(network.decoder.low, nn.Dropout2d(0.2))  # type: ignore[arg-type]
    return method


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists by dotted path."""
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return {path: value}
    return {key: leaf for name, inner in pairs for key, leaf in _flat(inner, f"{path}.{name}").items()}


@pytest.mark.parametrize(
    ("method", "optimizer", "backbone", "accumulate"),
    [
        *((name, "sgd", "tiny", 1) for name in METHODS),
        ("u2pl", "adamw", "tiny", 1),
        ("u2pl", "sgd", "tiny", 2),
        *((method, "adamw", "vit_tiny", 1) for method in VITS.values()),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(
    method, optimizer, backbone, accumulate, shapes, pseudo_labels, tmp_path, monkeypatch
):
    if backbone == "tiny":
        monkeypatch.setattr(trainer, "build_method", _with_dropout)
    config = _config(shapes, pseudo_labels, tmp_path / "whole", method, backbone)
    config = replace(
        config,
        optim=replace(
            config.optim,
            optimizer=optimizer,
            steps=END,
            clip_norm=1.0,
            warmup=LOST + 2,
            accumulate=accumulate,
            layer_decay=1.0 if backbone == "tiny" else 0.8,
            decay_norms=backbone == "tiny",
        ),
        run=replace(config.run, checkpoint_every=LOST),
    )
    cut = replace(config, out=str(tmp_path / "cut"))
    whole = trainer.train(config, PlainRuntime(str(config.out)))
    with pytest.raises(_Lost):
        trainer.train(cut, _Losing(str(cut.out), LOST))
    resumed = trainer.train(cut, PlainRuntime(str(cut.out)))

    assert resumed == whole
    assert resumed.step == END
    states = [_flat(checkpoint.read_state(f"{run.out}/{checkpoint.name(END)}")) for run in (config, cut)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        same = torch.equal(value, states[1][key]) if isinstance(value, Tensor) else value == states[1][key]
        assert same, key
    assert any("momentum_buffer" in key or "exp_avg" in key for key in states[0])
    timing = ("time", "images_per_second", "bytes_per_second", "decode_ms", "worker_seconds", "stall", "eta_seconds")
    timing += ("checkpoint_stall",)
    records = [
        [{k: v for k, v in line.items() if k not in timing} for line in _records(tmp_path / run, "train")]
        for run in ("whole", "cut")
    ]
    assert [line["step"] for line in records[1]] == list(range(1, END + 1))
    assert records[0] == records[1]
