from collections.abc import Callable, Generator
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config import cli
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.sweep.search import Range, early_stops, parse_space, prepare, sample


@pytest.fixture
def base(shapes, tmp_path) -> Callable[..., Config]:
    flags = ["--preset", "demo", "--data", shapes, "--out", str(tmp_path)]
    return lambda *more: cli.parse_config([*flags, *more], "", OPTIONS)[0]


def test_what_a_space_says():
    space = parse_space(["optim.lr=1e-4..0.1", "u2pl.lambda_c=0.05,0.1", "optim.power=0.5..1", "optim.steps=100..900"])
    assert space == {
        "optim.lr": Range(1e-4, 0.1),
        "u2pl.lambda_c": ("0.05", "0.1"),
        "optim.power": Range(0.5, 1),
        "optim.steps": Range(100, 900),
    }
    ranges = {key: each for key, each in space.items() if isinstance(each, Range)}
    assert {key: (each.logarithmic, each.whole) for key, each in ranges.items()} == {
        "optim.lr": (True, False),
        "optim.power": (False, False),
        "optim.steps": (False, True),
    }


@pytest.mark.parametrize("text", ["x", "a.b=", "=1..2", "a.b=2..1", "a.b=1..inf", "a.b=x..y", "a.b=1..", "a.b=1..1"])
def test_a_space_that_is_none(text):
    with pytest.raises(UserError, match="--space"):
        parse_space([text])


def test_a_key_twice_or_none():
    with pytest.raises(UserError, match="each key once"):
        parse_space(["a.b=1,2", "a.b=1..2"])
    with pytest.raises(UserError, match="name what to draw"):
        parse_space([])


def test_equal_draws_are_the_same_run(base):
    prepared, space = prepare(base(), {"optim.lr": Range(1e-4, 0.1)})
    values = (0.012346, 0.012354, 0.0124)
    one, same, other = (sample(prepared, space, {"optim.lr": value}, 7) for value in values)
    assert (one.name, one.config.optim.lr) == ("007-optim.lr-0.01235", 0.01235)
    assert same == one
    assert other.out != one.out


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"optim.lrr": Range(0.1, 1)}, "did you mean lr"),
        ({"optim.optimizer": ("sgd", "adamm")}, "adamm"),
        ({"data.scale": Range(0.5, 2)}, "data.scale"),
        ({"model.dropout": Range(0.5, 2.0)}, "model.dropout: must be between 0 and 1, got 2"),
    ],
)
def test_both_ends_are_checked_before_anything_starts(base, space, words):
    with pytest.raises(UserError, match=words):
        prepare(base(), space)


def test_whole_ends_of_an_option_that_holds_fractions_are_no_choice_of_two(base):
    texts = ["model.dropout=0..1", "u2pl.lambda_c=0..1", "optim.steps=100..900"]
    _, space = prepare(base("--method", "u2pl"), parse_space(texts))
    ranges = {key: each for key, each in space.items() if isinstance(each, Range)}
    assert {key: each.whole for key, each in ranges.items()} == {
        "model.dropout": False, "u2pl.lambda_c": False, "optim.steps": True,
    }  # fmt: skip
    assert ranges["model.dropout"].text(0.25) == "0.25"


def test_places_do_not_depend_on_where_a_sample_runs(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").touch()
    _, space = prepare(base(), {"model.weights": ("none", "a.pth")})
    assert space == {"model.weights": ("none", str(tmp_path / "a.pth"))}


@pytest.mark.parametrize(("value", "text"), [(0.99962, "0.9996"), (0.999999, "0.9999"), (0.98, "0.99")])
def test_no_draw_is_rounded_past_an_end(value, text):
    assert Range(0.99, 0.9999).text(value) == text


def test_values_that_do_not_go_together_are_that_samples_problem(base):
    prepared, space = prepare(base("--method", "u2pl"), parse_space(["u2pl.r_l=1..15", "u2pl.r_h=10..21"]))
    assert "r_l" in sample(prepared, space, {"u2pl.r_l": 14, "u2pl.r_h": 11}, 0).problem
    assert sample(prepared, space, {"u2pl.r_l": 3, "u2pl.r_h": 11}, 1).problem == ""


# ---- early stops ------------------------------------------------------------------------------------------------


def reports(
    curves: np.ndarray, every: int, at_once: int, rng: np.random.Generator
) -> Generator[tuple[int, int, float], bool]:
    """Trial, step and score as they come while `at_once` trials run at speeds of their own; send back who is stopped.

    Args:
        curves: float64 [trials, evaluations].
        every: steps between evaluations.
        at_once: trials at a time.
        rng: decides who is next.
    """
    waiting, running = list(range(len(curves))), dict[int, int]()
    while waiting or running:
        while waiting and len(running) < at_once:
            running[waiting.pop(0)] = 0
        trial = int(rng.choice(list(running)))
        running[trial] += 1
        stopped = yield trial, running[trial] * every, curves[trial, running[trial] - 1]
        if stopped or running[trial] == curves.shape[1]:
            del running[trial]


@pytest.mark.parametrize("at_once", [1, 4, 16])
@pytest.mark.parametrize("seed", range(5))
def test_early_stops_are_those_of_asha_whoever_runs_beside_whom(base, at_once, seed):
    """Against the rule written out: at each rung, worse than the best third of those that came there before."""
    rng = np.random.default_rng(seed)
    curves = np.sort(rng.random((16, 27)), 1) * rng.random((16, 1))
    curves[11] = curves.max(0) + 0.01
    scheduler = early_stops(base("--eval.every", "10", "--optim.steps", "270"))
    scheduler.set_search_properties("score", "max")
    trials = [SimpleNamespace(trial_id=str(number)) for number in range(16)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    rungs: dict[int, list[float]] = {10: [], 30: [], 90: [], 270: []}
    last, stopped = dict[int, int](), set[int]()
    stream = reports(curves, 10, at_once, rng)
    trial, step, score = next(stream)
    while True:
        last[trial] = step
        before = rungs.get(step, [])
        expected = bool(before) and score < np.percentile(before, 100 * 2 / 3)
        found = scheduler.on_trial_result(None, trials[trial], {"step": step, "score": score})
        assert (found == "STOP") == expected, (trial, step)
        if step in rungs:
            rungs[step].append(score)
        stopped |= {trial} if expected else set()
        try:
            trial, step, score = stream.send(expected)
        except StopIteration:
            break
    assert last[11] == 270  # the best of all
    assert 11 not in stopped
    assert {last[number] for number in stopped} <= set(rungs)
    assert len(stopped) >= 8
