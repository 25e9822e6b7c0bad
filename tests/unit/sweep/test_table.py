"""What a terminal shows of a sweep."""

import pytest

from pipeline import storage
from pipeline.config import cli
from pipeline.methods import OPTIONS
from pipeline.sweep.table import TrialRow, evaluations, screen
from pipeline.sweep.trials import make_trial


@pytest.fixture
def rows(shapes, tmp_path):
    """Forty trials with long names: one runs, one has failed, three are done."""
    base = cli.parse_values(["--preset", "demo", "--data", shapes, "--out", str(tmp_path)], "", OPTIONS)[0]
    names = [f"u2pl-1_16-s{at:02d}-u2pl.negative_pixels-unreliable-optim.lr-0.0123" for at in range(40)]
    found = [TrialRow(make_trial(base, name, {})) for name in names]
    for at, state in ((3, "done"), (5, "done"), (7, "done"), (20, "failed"), (30, "running")):
        found[at].state = state
    return found


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 60), (40, 10), (80, 4)])
def test_it_fits_the_terminal(rows, columns, lines):
    shown = screen(rows, 45, columns, lines)
    assert len(shown) < max(lines, 5)
    assert max(map(len, shown)) < columns
    assert shown[-1] == "3 of 45 done, 1 failed"


def test_what_matters_stays_where_there_is_no_room_for_all(rows):
    *table, more, _ = screen(rows, 45, 80, 8)
    assert [line.split()[1] for line in table[1:]] == ["waiting", "waiting", "failed", "running"]
    assert more == "and 36 more"
    assert table[1].startswith("u2pl-1_16-s00-")


def test_where_there_is_room_all_are_whole(rows):
    shown = screen(rows, 45, 200, 60)
    assert len(shown) == 1 + 40 + 1
    assert shown[1].split()[0] == rows[0].trial.name


def test_evaluations_of_a_run_that_has_none(rows, tmp_path):
    assert evaluations(rows[0].trial.out) == []
    lines = b'{"kind": "train", "step": 5}\n{"kind": "eval", "step": 10, "miou": {"teacher": 0.5, "student": 0.4}}\n'
    storage.write_bytes(str(tmp_path / "metrics.jsonl"), lines)
    assert evaluations(str(tmp_path)) == [(10, 0.5)]
