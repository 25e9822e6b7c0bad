from dataclasses import replace

import pytest

from pipeline import cli
from pipeline.config import Config, as_dict
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.sweep import run
from pipeline.sweep.run import sized
from pipeline.sweep.trials import make_trials


def _base(shapes: str, out: object, *flags: str) -> Config:
    return cli.parse_config(["--preset", "demo", "--data", shapes, "--out", str(out), *flags], "", OPTIONS)[0]


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "expected"),
    [(2.0, 0.0, "0", (1, 2)), (8.0, 0.0, "2", (2, 6)), (96.0, 8.0, "0", (4, 2)), (96.0, 8.0, "1", (1, 8))],
)
def test_how_many_fit(shapes, tmp_path, monkeypatch, cpus, gpus, workers, expected):
    monkeypatch.setattr(run.cluster, "cpus_and_gpus", lambda: (cpus, gpus))
    trials = make_trials(_base(shapes, tmp_path, "--run.workers", workers), ["suponly", "u2pl"], ["1_8"], 1, {})
    done, at_once = sized(trials)
    assert [trial.config.run.workers for trial in done] == [expected[0]] * 2
    assert at_once == expected[1]
    assert [as_dict(trial.config) | {"run": None} for trial in done] == [
        as_dict(trial.config) | {"run": None} for trial in trials
    ]


def test_a_trial_that_fits_nowhere(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(run.cluster, "cpus_and_gpus", lambda: (1.0, 0.0))
    trials = make_trials(_base(shapes, tmp_path), ["u2pl"], ["1_8"], 1, {})
    big = [replace(t, config=replace(t.config, run=replace(t.config.run, workers=2))) for t in trials]
    with pytest.raises(UserError, match=r"does not fit .* lower run\.workers"):
        sized(big)
