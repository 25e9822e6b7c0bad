"""A loss that jumps is found; one that falls, begins, or is small noise, is none."""

import pytest

from pipeline.report.spikes import spikes
from tests.unit.report.made import only, write_run


def write(folder, values: list[float], total: float = 1.0) -> list[list[str]]:
    logs = {"total": total, "loss": lambda step: {"supervised": values[step // 10 - 1]}}
    write_run(folder / "a", scores=(0.5,) * len(values), logs=logs)
    return [list(row) for row in spikes(only(folder)).rows]


def test_a_jump_is_found(tmp_path):
    rows = write(tmp_path, [1.0, 0.5, 0.5, 0.4, 1.5, 0.4, 0.3])
    assert rows == [["suponly", "1_4", "0", "supervised", "50", "1.5", "0.5"]]


def test_one_at_the_very_end_counts(tmp_path):
    assert len(write(tmp_path, [1.0, 0.5, 0.5, 0.4, 1.5])) == 1


@pytest.mark.parametrize(
    "values",
    [
        [9.0, 1.0, 0.5, 0.4, 0.3, 0.2],
        [0.01, 0.01, 0.01, 0.5, 0.5, 0.5, 0.5],
        [0.001, 0.001, 0.001, 0.004, 0.001, 0.001],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ],
    ids=["falls", "begins", "noise of a small term", "nothing"],
)
def test_these_are_none(tmp_path, values):
    assert write(tmp_path, values) == []


def test_the_highest_of_many_are_shown(tmp_path):
    values = [1.0, 1.0, 1.0]
    for at in range(20):
        values += [4.0 + at, 1.0, 1.0, 1.0]
    logs = {"loss": lambda step: {"supervised": values[step // 10 - 1]}}
    write_run(tmp_path / "a", scores=(0.5,) * len(values), logs=logs)
    table = spikes(only(tmp_path))
    assert table.title.startswith("Loss spikes, the 12 highest of 20: ")
    assert [row[5] for row in table.rows][:2] == ["23", "22"]
