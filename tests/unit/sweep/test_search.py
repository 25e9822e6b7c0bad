from collections.abc import Callable

import pytest

from pipeline.config import cli
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.sweep.search import Range, parse_space, prepare, sample


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
