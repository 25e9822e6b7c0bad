from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.batch import Batch, Views
from pipeline.config.cli import resolve
from pipeline.errors import Diverged
from pipeline.ingest.loader import IngestStats
from pipeline.methods import OPTIONS, Losses
from pipeline.ops.world import World
from pipeline.training import meter as meters
from pipeline.training.meter import Meter
from tests.unit.ops.worlds import on_ranks

NAN = float("nan")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is told."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(meters.time, "perf_counter", lambda: clock.now)
    return clock


def _meter(world: World = World(), **optim: int) -> tuple[Meter, Any]:  # noqa: B008
    config = resolve({"optim": {"steps": 100, "batch_labeled": 2, "batch_unlabeled": 4, **optim}}, OPTIONS)
    loader: Any = SimpleNamespace(stats=IngestStats())
    return Meter(config, world, loader, torch.device("cpu")), loader


def _batch(index: int, *, unlabeled: bool = True) -> Batch:
    image, valid = torch.zeros(2, 3, 1, 1, dtype=torch.uint8), torch.ones(2, 1, 1, dtype=torch.bool)
    sides = [
        Views(image, None, valid, tuple(f"{name}{index}-{i}" for i in range(n))) for name, n in (("l", 2), ("u", 4))
    ]
    return Batch(sides[0], sides[1] if unlabeled else None)


def _add(meter: Meter, index: int, **terms: float) -> None:
    losses = Losses({name: torch.tensor(value) for name, value in terms.items()}, {"kept": torch.tensor(0.5)})
    meter.add(index, losses, _batch(index))


def test_means_of_an_interval(clock):
    meter, loader = _meter()
    for first in (0, 2):
        _add(meter, first, a=1.0 + first, b=0.0)
        _add(meter, first + 1, a=3.0 + first, b=1.0)
        clock.now += 4.0
        loader.stats.stalled += 1.0
        record = meter.summary(first + 2, 0.01)
        assert record["loss"] == {"a": 2.0 + first, "b": 0.5}
        assert record["total"] == 2.5 + first
        assert record["images_per_second"] == 3.0  # 2 steps of 6 images in 4 s
        assert record["stall"] == 0.25
        assert record["eta_seconds"] == (98 - first) * 2
        assert (record["lr"], record["kept"]) == (0.01, 0.5)
    line = meter.line(4, record)
    assert "step      4/100  loss 4.5000  (a 4.0000  b 0.5000)  kept 50%" in line
    assert line.endswith("  3.0 img/s  stall 25%  eta 3m12s")
    assert meter.brief(record) == "loss 4.5000  3.0 img/s  eta 3m12s"


def test_the_first_step_is_told_and_the_time_left_does_not_follow_from_it(clock):
    meter, _ = _meter()
    _add(meter, 0, a=1.0)
    clock.now += 60.0  # data is read, losses are compiled
    first = meter.first(1, 0.1)
    assert (first["total"], first["images_per_second"]) == (1.0, 0.1)
    assert "eta" not in meter.line(1, first) + meter.brief(first)
    _add(meter, 1, a=3.0)
    clock.now += 2.0
    second = meter.summary(2, 0.1)
    assert (second["total"], second["eta_seconds"]) == (2.0, 98 * 2.0)  # of both steps the loss, of one the time
    for pace, expected in ((2.0, 2.0), (12.0, 5.0)):  # a slow interval counts in part
        _add(meter, 2, a=1.0)
        clock.now += pace
        assert meter.summary(3, 0.1)["eta_seconds"] == 97 * expected


def test_a_run_of_one_step_has_its_record(clock):
    meter, _ = _meter(steps=1)
    _add(meter, 0, a=1.0)
    clock.now += 60.0
    meter.first(1, 0.1)
    assert meter.summary(1, 0.1)["eta_seconds"] == 0


def test_what_ingest_did_is_part_of_the_record(clock):
    meter, loader = _meter()
    stats = loader.stats
    for retries, skipped in ((2, 1), (3, 1)):
        _add(meter, 0, a=1.0)
        stats.samples += 10
        stats.encoded += 5000
        stats.decoding += 0.05
        stats.retries, stats.skipped = retries, skipped
        clock.now += 2.0
        record = meter.summary(1, 0.1)
        assert record["bytes_per_second"] == 2500  # rates of the interval
        assert record["decode_ms"] == 5.0
        assert (record["retries"], record["skipped"]) == (retries, skipped)  # counts since the start


def test_what_the_ranks_ingest_is_summed(clock):
    def run(world: World) -> dict[str, Any]:
        meter, loader = _meter(world)
        _add(meter, 0, a=1.0)
        loader.stats = IngestStats(10, world.rank, 1000, 0.02, 1 + world.rank, 0.5 * world.rank)
        clock.now += 2.0
        return meter.summary(1, 0.1)

    for record in on_ranks(2, run):
        assert (record["bytes_per_second"], record["decode_ms"], record["stall"]) == (1000, 2.0, 0.125)
        assert (record["retries"], record["skipped"]) == (3, 1)


def test_one_sided_batches_count_their_own_images(clock):
    meter, _ = _meter()
    meter.add(0, Losses({"a": torch.tensor(1.0)}, {}), _batch(0, unlabeled=False))
    clock.now += 1
    assert meter.summary(1, 0.1)["images_per_second"] == 2.0


def test_pauses_are_no_training_time(clock):
    """A checkpoint in the middle of an interval, and one long after an evaluation."""
    meter, _ = _meter()
    rates = []
    for step in range(4):
        _add(meter, step, a=1.0)
        clock.now += 2.0
        if step == 1:
            with meter.paused():
                clock.now += 50.0
        rates.append(meter.summary(step + 1, 0.1)["images_per_second"])
        if step == 2:
            with meter.paused():
                clock.now += 7.0
    assert rates == [3.0] * 4


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_the_first_bad_step_is_named_with_its_samples(clock, value):
    meter, _ = _meter()
    for step, bad in ((5, 1.0), (6, value), (7, 1.0), (8, value)):
        _add(meter, step, a=1.0, b=bad)
    clock.now += 1
    for look in (meter.check, lambda: meter.summary(9, 0.1)):
        with pytest.raises(Diverged, match="step 6; this rank's samples: l6-0, l6-1, u6-0, u6-1, u6-2, u6-3"):
            look()


def test_terms_that_cancel_are_bad_nevertheless(clock):
    meter, _ = _meter()
    _add(meter, 0, a=float("inf"), b=-float("inf"))
    with pytest.raises(Diverged, match="step 0"):
        meter.check()


def test_check_of_an_empty_interval_is_fine():
    _meter()[0].check()


def test_every_rank_raises_when_one_diverges(clock):
    def run(world: World) -> str:
        meter, _ = _meter(world)
        _add(meter, 3, a=NAN if world.rank == 1 else 1.0)
        _add(meter, 4, a=1.0)
        try:
            meter.check()
        except Diverged as error:
            return str(error)
        return "fine"

    assert all("not finite at step 3" in text for text in on_ranks(2, run))


def test_means_over_ranks(clock):
    def run(world: World) -> dict[str, float]:
        meter, _ = _meter(world)
        _add(meter, 0, a=float(world.rank))
        clock.now += 1
        return meter.summary(1, 0.1)["loss"]

    assert on_ranks(2, run) == [{"a": 0.5}] * 2


def test_every_rank_raises_when_a_tensor_of_one_is_not_finite(clock):
    """Names the tensor, and the samples of the last step, also after a line of the log has ended the interval."""

    def run(world: World) -> str:
        meter, _ = _meter(world)
        _add(meter, 3, a=1.0)
        clock.now += 1
        meter.summary(4, 0.1)
        state = {"count": torch.ones((), dtype=torch.int64), "weight": torch.ones(3), "bias": torch.ones(2)}
        meter.check_state(state)
        if world.rank == 1:
            state["bias"][1] = torch.inf
        try:
            meter.check_state(state)
        except Diverged as error:
            return str(error)
        return "fine"

    assert all(
        text.startswith("bias is not finite after step 3; this rank's samples: l3-0") for text in on_ranks(2, run)
    )
