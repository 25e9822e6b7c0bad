import pytest

from pipeline.config import cli
from pipeline.config.hints import ELSEWHERE
from pipeline.config.methods import OPTIONS
from pipeline.errors import UserError


def _said(*argv: str, fresh: bool = True) -> str:
    def own(parser: cli.Parser) -> None:
        if fresh:
            parser.add_argument("--fresh", action="store_true")

    with pytest.raises(UserError) as error:
        cli.parse_config(argv, "A job.", OPTIONS, own)
    return str(error.value)


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("--epochs", "--optim.steps"),
        ("--gpus=2", "--scaling.workers"),
        ("--batch-size", "--batch"),
        ("--learning_rate", "--optim.lr"),
        ("--backbone", "--model.backbone"),
        ("--bakbone", "--model.backbone"),
        ("--lambda_c", "--u2pl.lambda_c"),
        ("--momentum", "--ael.momentum"),
        ("--temperature", "--pseudoseg.temperature or --pc2seg.temperature or --u2pl.temperature"),
        ("--u2pl.lamda_c", "--u2pl.lambda_c"),
        ("--print-config", "--print_config"),
        ("-lr", "--lr or --optim.lr"),
        ("optim.lr=0.1", "--optim.lr"),
    ],
)
def test_a_wrong_flag_finds_the_right_one(argument, meant):
    assert _said(argument) == f"unknown argument {argument!r}; did you mean {meant}?"


def test_to_resume_needs_no_flag():
    assert _said("--resume").endswith("the same command with the same --out goes on where it was cut off")
    assert "no need" not in _said("--resume", fresh=False)  # of a command that has no runs


@pytest.mark.parametrize("argument", ["stray", "--zzzz", "--", "="])
def test_of_what_is_like_nothing_help_is_named(argument):
    assert _said("--seed", "1", argument) == f"unknown argument {argument!r}; see --help"


def test_what_other_words_stand_for_is_a_flag():
    parser = cli._parser("A job.", OPTIONS)
    known = {flag.lstrip("-") for action in parser._actions for flag in action.option_strings}
    assert set(ELSEWHERE.values()) <= known
    assert not known & ELSEWHERE.keys(), "these are flags themselves"
