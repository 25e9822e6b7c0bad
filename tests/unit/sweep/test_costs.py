import json

import pytest

from pipeline import storage
from pipeline.config import cli
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.sweep.costs import Node, parse_node, parse_step_seconds, plan
from pipeline.sweep.trials import make_trials


@pytest.fixture
def trials(shapes, tmp_path):
    flags = ["--preset", "demo", "--data", shapes, "--out", str(tmp_path), "--scaling.workers", "2"]
    base = cli.parse_values([*flags, "--optim.steps", "3600"], "", OPTIONS)[0]
    return make_trials(base, ["suponly", "u2pl"], ["1_8"], 2, {})


def test_hours_and_money(trials):
    lines = plan(trials, parse_step_seconds(["0.5", "u2pl=2"]), parse_node(["4", "8", "32"]))
    assert [line.split() for line in lines[1:5]] == [
        ["suponly-1_8-s0", "2", "3600", "0.5", "12", "0.50"],
        ["suponly-1_8-s1", "2", "3600", "0.5", "12", "0.50"],
        ["u2pl-1_8-s0", "2", "3600", "2", "12", "2.00"],
        ["u2pl-1_8-s1", "2", "3600", "2", "12", "2.00"],
    ]
    # (0.5 + 0.5 + 2 + 2) hours of 2 workers each, 8 workers to a node
    assert "4 trials, 10.0 worker hours: 1.2 node hours of 8 workers, 40.00 at 32 an hour" in lines[5]
    assert lines[6].startswith("about 0.3 hours on 4 nodes")


def test_what_ran_already_tells_the_time_of_a_step(trials):
    train = {"kind": "train", "step": 900, "eta_seconds": 10.0, "images_per_second": 48.0, "workers": 1}
    scored = {"kind": "eval", "step": 900, "miou": {"student": 0.5}, "worker_seconds": 300.0}
    _record(trials[2], train)
    with pytest.raises(UserError, match=r"no step of suponly was timed.* --step_seconds suponly=SECONDS"):
        plan(trials, {}, Node(count=2, workers=1, price=0))
    lines = plan(trials, {"suponly": 1.0}, Node(count=2, workers=1, price=0))
    assert lines[3].split()[1:] == ["1", "3600", "0.25", "12", "0.25"]  # 12 images a step at 48 a second
    assert "at 0" not in lines[5]
    assert "evaluations that nobody has timed" in lines[5]
    _record(trials[2], train, scored)
    _record(trials[0], train, scored)
    lines = plan(trials, {}, Node(count=1, workers=1, price=0))
    assert lines[3].split()[1:] == ["1", "3600", "0.25", "12", "1.25"]  # 12 x 300 worker seconds
    assert "nobody has timed" not in lines[5]
    given = plan(trials, {"": 2.0}, Node(count=2, workers=1, price=0))
    assert given[3].split()[3] == "2"  # what is given counts more than records


def test_a_record_of_other_work_tells_nothing(shapes, tmp_path):
    base = cli.parse_values(["--preset", "demo", "--data", shapes, "--out", str(tmp_path)], "", OPTIONS)[0]
    small, large = make_trials(base, ["suponly"], ["1_8"], 1, {"model.width": ("8", "64")})
    _record(small, {"kind": "train", "step": 9, "eta_seconds": 1.0, "images_per_second": 48.0, "workers": 1})
    assert plan([small], {}, Node(count=1, workers=1, price=0))
    with pytest.raises(UserError, match="no step of suponly was timed"):
        plan([small, large], {}, Node(count=1, workers=1, price=0))


def test_more_workers_than_the_nodes_hold(trials):
    with pytest.raises(UserError, match=r"1 nodes of 1 hold no scaling\.workers 2"):
        plan(trials, {"": 1.0}, Node(count=1, workers=1, price=0))


def _record(trial, *records):
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    storage.write_bytes(f"{trial.out}/metrics.jsonl", lines.encode())


@pytest.mark.parametrize("text", ["x", "u2pl=", "u2pl=-1", "0"])
def test_step_seconds_that_are_none(text):
    with pytest.raises(UserError, match="--step_seconds"):
        parse_step_seconds([text])


@pytest.mark.parametrize("texts", [["a", "1", "1"], ["0", "1", "1"], ["1", "1", "-3"], ["1.5", "1", "1"]])
def test_a_node_that_is_none(texts):
    with pytest.raises(UserError, match="--node"):
        parse_node(texts)


def test_auto_takes_what_the_nodes_hold_and_the_batch_allows(shapes, tmp_path):
    base = cli.parse_values(["--preset", "demo", "--data", shapes, "--out", str(tmp_path)], "", OPTIONS)[0]
    trials = make_trials(base, ["u2pl"], ["1_8"], 1, {})
    assert plan(trials, {"": 1.0}, Node(count=1, workers=1, price=0))[1].split()[1] == "1"
    assert plan(trials, {"": 1.0}, Node(count=2, workers=8, price=0))[1].split()[1] == "4"


def test_self_training_has_a_teacher_to_pay_for(shapes, tmp_path):
    base = cli.parse_values(["--preset", "demo", "--data", shapes, "--out", str(tmp_path)], "", OPTIONS)[0]
    lines = plan(make_trials(base, ["self_training"], ["1_8"], 1, {}), {"": 1.0}, Node(count=1, workers=1, price=0))
    assert lines[1].split()[2] == "1800"
    assert "evaluations and labelling that nobody has timed" in lines[2]
