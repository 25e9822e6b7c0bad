from typing import Any

import pytest

from pipeline.cluster import nodes
from pipeline.cluster.nodes import Machine
from pipeline.config import cli
from pipeline.config.schema import as_dict
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.sweep.run import sized
from pipeline.sweep.trials import make_trials


def _base(shapes: str, out: object, *flags: str) -> dict[str, Any]:
    return cli.parse_values(["--preset", "demo", "--data", shapes, "--out", str(out), *flags], "", OPTIONS)[0]


@pytest.mark.parametrize(
    ("described", "workers", "expected"),
    [
        ("2:0", "auto", ("1", 2)),
        ("8:0", "2", ("2", 6)),
        ("96:8", "auto", ("auto", 2)),
        ("96:8", "1", ("1", 8)),
        ("16:4", "1", ("1", 4)),  # each with less than 4 CPUs, so that it can also read
        ("96:8", "1 --scaling.gpus_per_worker 0.5", ("1", 16)),
        ("8:1", "1 --scaling.gpus_per_worker 0.1", ("1", 10)),
        ("16:4", "1 --scaling.cpus_per_worker 4", ("1", 3)),
        ("96:8", "2..4", ("2..4", 4)),
        ("96:8", "auto --scaling.gpus_per_worker 0", ("1", 128)),
    ],
)
def test_how_many_fit(shapes, tmp_path, monkeypatch, described, workers, expected):
    _pretend(monkeypatch, described)
    base = _base(shapes, tmp_path, "--scaling.workers", *workers.split())
    trials = make_trials(base, ["suponly", "u2pl"], ["1_8"], 1, {})
    done, at_once = sized(trials)
    assert [trial.config.scaling.workers for trial in done] == [expected[0]] * 2
    assert at_once == expected[1]
    assert [as_dict(trial.config) | {"scaling": None} for trial in done] == [
        as_dict(trial.config) | {"scaling": None} for trial in trials
    ]


@pytest.mark.parametrize(("grows", "at_once"), [(False, 2), (True, 5)])
def test_more_at_once_than_there_is_room_for_needs_a_cluster_that_grows(shapes, tmp_path, monkeypatch, grows, at_once):
    _pretend(monkeypatch, "96:8", grows=grows)
    trials = make_trials(_base(shapes, tmp_path, "--scaling.workers", "4"), ["u2pl"], ["1_8"], 1, {})
    assert [sized(trials, asked)[1] for asked in (0, 1, 5)] == [2, 1, at_once]


def test_a_trial_that_fits_nowhere(shapes, tmp_path, monkeypatch):
    _pretend(monkeypatch, "1:0")
    trials = make_trials(_base(shapes, tmp_path, "--scaling.workers", "2"), ["u2pl"], ["1_8"], 1, {})
    with pytest.raises(UserError, match=r"lower scaling\.workers"):
        sized(trials)


def _pretend(monkeypatch, described, *, grows=False):
    """A cluster of nodes `CPUS:GPUS`."""
    found = [Machine(*map(float, node.split(":"))) for node in described.split()]
    monkeypatch.setattr(nodes, "machines", lambda: found)
    monkeypatch.setattr(nodes, "grows", lambda: grows)
