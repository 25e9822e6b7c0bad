"""A training on real hosts goes on with fewer of them than it began with, and takes in those that come."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cluster.elastic import RESIZE_SECONDS
from pipeline.config import cli
from pipeline.methods import OPTIONS
from pipeline.training.runtime import PlainRuntime
from pipeline.training.trainer import train
from tests.cluster.fleet import TRAIN_WORKER, Fleet
from tests.cluster.runs import FLAGS, counts, curve, registered
from tests.jobs import SHORT, records
from tests.processes import held, wait_for

ENDLESS = 100_000
ELASTIC = [*FLAGS, "--optim.steps", str(ENDLESS), "--eval.every", str(ENDLESS), "--optim.optimizer", "sgd"]
ELASTIC += ["--optim.lr", "0.005", "--u2pl.lambda_c", "0"]
"""Rounding errors stay small, and nothing is drawn by rank: losses of one worker and of two can be compared."""


def test_what_is_left_goes_on_and_grows(whole: Fleet, shapes: str, tmp_path: Path) -> None:
    job = whole.train(tmp_path / "log", run := "s3://runs/elastic", *ELASTIC, "--scaling.workers", "1..2")
    wait_for("a checkpoint", lambda: registered(whole, run) or job.over, 300)
    left = whole.training[0]
    for host in whole.workers:
        if host is not left:  # the spare one, too
            host.power_off()
    wait_for("one worker", lambda: counts(whole, run) == [2, 1] or job.over, 300)
    assert whole.training == [left]
    with held(left.find(TRAIN_WORKER)[0]):  # or hundreds of steps are done before it may grow
        whole.start_workers(1)
        time.sleep(RESIZE_SECONDS)
    wait_for("two workers", lambda: counts(whole, run) == [2, 1, 2] or job.over, 300)
    assert not job.over, job.said
    whole.client.run("ray", "job", "stop", job.name, "--address", whole.jobs)
    assert job.wait() != 0

    grown = curve(whole, run)
    assert [record["step"] for record in grown] == list(range(1, len(grown) + 1))
    totals = [record["total"] for record in grown]
    assert totals == pytest.approx(plain(shapes, str(tmp_path / "plain"), len(grown)), rel=0.02)


def plain(shapes: str, out: str, steps: int) -> list[float]:
    """The losses of the first steps of one process."""

    class Reached(Exception):
        pass

    class Host(PlainRuntime):
        def report(self, step: int, score: float | None, write: Callable[[Path], None] | None) -> None:
            if step >= steps:
                raise Reached

    config, _ = cli.parse_config([*SHORT, *ELASTIC, "--data", shapes, "--out", out], "test", OPTIONS)
    with pytest.raises(Reached):
        train(config, Host(out))
    return [record["total"] for record in records(out)][:steps]
