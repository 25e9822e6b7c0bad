import pytest

from pipeline import cli, cluster
from pipeline.config import Config, as_dict
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.sweep.run import sized
from pipeline.sweep.trials import make_trials


def _base(shapes: str, out: object, *flags: str) -> Config:
    return cli.parse_config(["--preset", "demo", "--data", shapes, "--out", str(out), *flags], "", OPTIONS)[0]


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "expected"),
    [
        (2.0, 0.0, "auto", ("1", 2)),
        (8.0, 0.0, "2", ("2", 6)),
        (96.0, 8.0, "auto", ("auto", 2)),
        (96.0, 8.0, "1", ("1", 8)),
        (96.0, 8.0, "1 --scaling.gpus_per_worker 0.5", ("1", 16)),
        (96.0, 8.0, "2..4", ("2..4", 4)),
    ],
)
def test_how_many_fit(shapes, tmp_path, monkeypatch, cpus, gpus, workers, expected):
    _pretend(monkeypatch, cpus, gpus)
    base = _base(shapes, tmp_path, "--scaling.workers", *workers.split())
    trials = make_trials(base, ["suponly", "u2pl"], ["1_8"], 1, {})
    done, at_once = sized(trials)
    assert [trial.config.scaling.workers for trial in done] == [expected[0]] * 2
    assert at_once == expected[1]
    assert [as_dict(trial.config) | {"scaling": None} for trial in done] == [
        as_dict(trial.config) | {"scaling": None} for trial in trials
    ]


def test_a_trial_that_fits_nowhere(shapes, tmp_path, monkeypatch):
    _pretend(monkeypatch, 1.0, 0.0)
    trials = make_trials(_base(shapes, tmp_path, "--scaling.workers", "2"), ["u2pl"], ["1_8"], 1, {})
    with pytest.raises(UserError, match=r"lower scaling\.workers"):
        sized(trials)


def _pretend(monkeypatch, cpus, gpus):
    """A cluster of that size."""
    for name in ("cpus_and_gpus", "capacity"):
        monkeypatch.setattr(cluster, name, lambda: (cpus, gpus))
