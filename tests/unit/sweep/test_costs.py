import json

import pytest

from pipeline import cli, storage
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.sweep.costs import Node, parse_node, parse_step_seconds, plan
from pipeline.sweep.trials import make_trials


@pytest.fixture
def trials(shapes, tmp_path):
    flags = ["--preset", "demo", "--data", shapes, "--out", str(tmp_path), "--run.workers", "2"]
    base = cli.parse_config([*flags, "--optim.steps", "3600"], "", OPTIONS)[0]
    return make_trials(base, ["suponly", "u2pl"], ["1_8"], 2, {})


def test_hours_and_money(trials):
    lines = plan(trials, parse_step_seconds(["0.5", "u2pl=2"]), parse_node(["4", "8", "32"]))
    assert [line.split() for line in lines[1:5]] == [
        ["suponly-1_8-s0", "3600", "0.5", "0.50"],
        ["suponly-1_8-s1", "3600", "0.5", "0.50"],
        ["u2pl-1_8-s0", "3600", "2", "2.00"],
        ["u2pl-1_8-s1", "3600", "2", "2.00"],
    ]
    # (0.5 + 0.5 + 2 + 2) hours of 2 workers each, 8 workers to a node
    assert "4 trials, 10.0 worker hours: 1.2 node hours of 8 workers, 40.00 at 32 an hour" in lines[5]
    assert lines[6].startswith("about 0.3 hours on 4 nodes")


def test_what_ran_already_tells_the_time_of_a_step(trials):
    record = {"kind": "train", "step": 900, "eta_seconds": 10.0, "images_per_second": 48.0}
    storage.write_bytes(f"{trials[2].out}/metrics.jsonl", f"{json.dumps(record)}\n".encode())
    with pytest.raises(UserError, match=r"no step of suponly was timed.* --step_seconds suponly=SECONDS"):
        plan(trials, {}, Node(count=1, workers=1, price=0))
    lines = plan(trials, {"suponly": 1.0}, Node(count=1, workers=1, price=0))
    assert lines[3].split()[1:] == ["3600", "0.25", "0.25"]  # 12 images a step at 48 a second
    assert "at 0" not in lines[5]


@pytest.mark.parametrize("text", ["x", "u2pl=", "u2pl=-1", "0"])
def test_step_seconds_that_are_none(text):
    with pytest.raises(UserError, match="--step_seconds"):
        parse_step_seconds([text])


@pytest.mark.parametrize("texts", [["a", "1", "1"], ["0", "1", "1"], ["1", "1", "-3"], ["1.5", "1", "1"]])
def test_a_node_that_is_none(texts):
    with pytest.raises(UserError, match="--node"):
        parse_node(texts)
