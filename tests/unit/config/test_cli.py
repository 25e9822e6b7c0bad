import argparse
import dataclasses
import re
import sys

import pytest
import yaml

from pipeline.config import cli
from pipeline.config.schema import Config, presets
from pipeline.errors import UserError
from pipeline.methods import OPTIONS


def _parse(*argv: str) -> Config:
    return cli.parse_config(argv, "A job.", OPTIONS)[0]


def _file(tmp_path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def test_split_by_flag_and_by_unquoted_yaml(tmp_path):
    assert _parse("--split", "1_2").split == "1_2"
    assert _parse("--split=1_16").split == "1_16"
    assert _parse("--config", _file(tmp_path, "split: 1_2")).split == "1_2"


def test_defaults_then_preset_then_file_then_flags(tmp_path):
    file = _file(tmp_path, "optim:\n  lr: 0.5\n  power: 0.7\nu2pl:\n  lambda_c: 0.3\n")
    config = _parse("--preset", "demo", "--config", file, "--optim.lr", "0.25")
    assert config.model.dropout == Config().model.dropout
    assert config.model.backbone == "tiny"
    assert config.options["u2pl"].anchors == 64
    assert config.optim.power == 0.7
    assert config.options["u2pl"].lambda_c == 0.3
    assert config.optim.lr == 0.25


def test_an_empty_section_in_the_file_keeps_the_preset(tmp_path):
    config = _parse("--preset", "demo", "--config", _file(tmp_path, "data:\nu2pl:\n"), "--data.flip", "false")
    assert config.data.crop == (64, 64)
    assert config.data.flip is False
    assert config.options["u2pl"].anchors == 64


def test_demo_is_the_default_unless_something_is_named(tmp_path):
    assert _parse().model.backbone == "tiny"
    assert _parse("--data", "/somewhere").model.backbone == Config().model.backbone
    assert _parse("--config", _file(tmp_path, "seed: 3")).model.backbone == Config().model.backbone


def test_a_flag_of_another_method_is_refused_and_a_section_of_a_file_is_not(tmp_path):
    with pytest.raises(UserError, match=r"--u2pl\.lambda_c: method cps has no such option"):
        _parse("--method", "cps", "--u2pl.lambda_c", "3")
    config = _parse("--method", "cps", "--config", _file(tmp_path, "u2pl:\n  lambda_c: 3\n"))
    assert [*config.options] == ["cps"]
    assert _parse("--method", "u2pl_ael", "--u2pl.lambda_c", "3", "--ael.depth", "2").options["u2pl"].lambda_c == 3


def test_a_flag_that_a_method_does_not_read_is_refused_and_a_preset_is_not():
    with pytest.raises(UserError, match=r"--u2pl\.variant: method u2pl_ael has no such option"):
        _parse("--method", "u2pl_ael", "--u2pl.variant", "upstream")
    assert _parse("--preset", "demo", "--method", "u2pl_ael").options["u2pl"].warmup == 0.3


def test_flags_of_a_sweep_are_those_of_any_of_its_methods():
    def names(args: argparse.Namespace) -> list[str]:
        return ["suponly", "cps"]

    values, _ = cli.parse_values(["--cps.cutmix", "false"], "A job.", OPTIONS, methods=names)
    assert values["cps"]["cutmix"] == "false"
    with pytest.raises(UserError, match=r"--u2pl\.lambda_c: method suponly, cps has no such option"):
        cli.parse_values(["--u2pl.lambda_c", "3"], "A job.", OPTIONS, methods=names)
    values, _ = cli.parse_values(
        ["--self_training.keep", "0.5"], "A job.", OPTIONS, methods=lambda _: ["self_training"]
    )
    assert cli.resolve(values, OPTIONS).method == "self_training"


def test_flags_of_methods_and_switches():
    config = _parse("--u2pl.lambda_c", "0.5", "--run.tensorboard", "false", "--data.flip", "--data", "x")
    assert config.options["u2pl"].lambda_c == 0.5
    assert config.run.tensorboard is False
    assert config.data.flip is True
    assert config.data.root == "x"


def test_flags_that_take_several_values(tmp_path):
    config = _parse(
        "--data.unlabeled_pools", "s3://a", "s3://b,c", "--data.pool_weights", "2", "1", "0.5", "--seed", "3"
    )
    assert config.data.unlabeled_pools == ("s3://a", "s3://b,c")
    assert config.data.pool_weights == (2.0, 1.0, 0.5)
    assert config.seed == 3
    file = _file(tmp_path, "data: {unlabeled_pools: [s3://a, /b], pool_weights: [1, 2, 3]}")
    assert _parse("--config", file).data.unlabeled_pools == ("s3://a", "/b")
    assert _parse("--config", file, "--data.unlabeled_pools", "--data.pool_weights").data.unlabeled_pools == ()
    assert _parse("--config", _file(tmp_path, "data: {unlabeled_pools: s3://a}")).data.unlabeled_pools == ("s3://a",)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optim.lrr", "1"], "unknown argument '--optim.lrr'; did you mean --optim.lr?"),
        (["--presett", "demo"], "did you mean --preset?"),
        (["--qqq"], "unknown argument '--qqq'; see --help"),
        (["stray"], "unknown argument 'stray'"),
        (["--preset", "demmo"], "unknown preset 'demmo'; did you mean demo?"),
        (["--method", "u2p"], "unknown method 'u2p'; did you mean u2pl?"),
        (["--optim.lr", "fast"], "optim.lr: expected a number from 0 on, got 'fast'"),
        (["--optim.steps", "1_2"], "optim.steps: expected a whole number"),
        (["--optim.steps", "1e-3"], "optim.steps: expected a whole number from 0 on, got '1e-3'"),
        (["--optim.steps", "1e999"], "optim.steps: expected a whole number from 0 on, got '1e999'"),
        (["--optim.steps", "1.5e0"], "optim.steps: expected a whole number from 0 on, got '1.5e0'"),
        (["--optim.lr"], "--optim.lr: expected one argument"),
        (["--model.backbone", "resnet5"], "did you mean resnet50?"),
        (["--optim.l", "1"], "unknown argument '--optim.l'"),  # never abbreviated
        (["--config", "nowhere.yaml"], "nowhere.yaml: not found"),
    ],
)
def test_mistakes_are_one_line_that_names_the_nearest(argv, words):
    with pytest.raises(UserError) as error:
        _parse(*argv)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_of_the_file_that_only_a_flag_has_is_unknown(tmp_path):
    def fresh(parser: cli.Parser) -> None:
        parser.add_argument("--fresh", action="store_true")

    with pytest.raises(UserError, match="unknown key 'fresh'"):
        cli.parse_config(["--config", _file(tmp_path, "fresh: true")], "A job.", OPTIONS, fresh)
    config, args = cli.parse_config(["--fresh"], "A job.", OPTIONS, fresh)
    assert args.fresh
    assert config == _parse()


@pytest.mark.parametrize("name", presets())
def test_print_config_is_yaml_of_the_same_config(name, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        _parse("--preset", name, "--seed", "5", "--print_config")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["seed"] == 5
    assert _parse("--config", _file(tmp_path, text)) == _parse("--preset", name, "--seed", "5")


@pytest.mark.parametrize("words", [["64", "96"], ["64,96"], ["64x96"]])
@pytest.mark.parametrize("flag", ["--crop", "--data.crop"])
def test_two_numbers_are_given_in_any_of_three_ways(flag, words):
    assert _parse(flag, *words).data.crop == (64, 96)


def test_what_everybody_types_is_short():
    config = _parse("--lr", "0.25", "--steps", "1e3", "--batch", "12", "--workers", "2..4", "--data", "x")
    assert (config.optim.lr, config.optim.steps, config.scaling.workers, config.data.root) == (0.25, 1000, "2..4", "x")
    assert (config.optim.batch_labeled, config.optim.batch_unlabeled) == (12, 12)
    apart = _parse("--optim.batch_unlabeled", "6", "--batch", "12").optim
    assert (apart.batch_labeled, apart.batch_unlabeled) == (12, 6)


def _help(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        _parse(*argv)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("method", OPTIONS)
def test_help_fits_two_screens_and_shows_the_methods_and_one_methods_options(method, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = _help(capsys, "--method", method, "--preset", "cityscapes", "--help").splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 80
    rows = [found[1] for line in lines if (found := re.match(r"  ([-\w.]+(?:, [-\w.]+)*) ", line))]
    shown = [word for row in rows for word in row.split(", ")]
    assert [name for name in shown if name in OPTIONS] == list(OPTIONS)
    own = [f"--{method}.{item.name}" for item in dataclasses.fields(OPTIONS[method][method])]
    assert [flag for flag in shown if flag.partition(".")[0] in {f"--{name}" for name in OPTIONS}] == own
    assert {"--data", "--lr", "--optim.lr", "--scaling.workers", "--print_config"} <= set(shown)


def test_help_shows_the_values_of_the_command_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = _help(capsys, "--preset", "demo", "--optim.lr", "0.25", "-h")
    assert re.search(r"--optim.lr +Base learning rate of the encoder.* \[0.25\]\n", text)
    assert re.search(r"--data.crop .* \[64 64\]\n", text)
    with pytest.raises(UserError, match=r"optim\.lr: expected a number"):
        _parse("--optim.lr", "fast", "--help")


def test_help_all_shows_every_section_type_and_default(capsys):
    text = " ".join(_help(capsys, "--help", "all").split())
    for words in (
        *("--lr NUMBER, --optim.lr NUMBER", "--u2pl.lambda_c NUMBER", "--data TEXT", "--steps N", "--crop N,N"),
        *("--data.unlabeled_pools TEXT ...", "--optim.optimizer sgd|adamw", "--data.flip true|false"),
        *("(default: 0.001)", "(default: 513 513)", "(default: true)", "(default: none)", "--print_config"),
    ):
        assert words in text
    assert "Base learning rate of the encoder" in text


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("wrong\n  thing"), 2, "job.py: wrong thing\n"),
        (KeyboardInterrupt(), 130, ""),
        (None, 0, ""),
    ],
)
def test_exit_codes(error, code, words, capsys, monkeypatch):
    def main(argv: list[str]) -> None:
        assert argv == ["--a"]
        if error:
            raise error

    monkeypatch.setattr(sys, "argv", ["/path/job.py", "--a"])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == code
    assert capsys.readouterr().err == words


def test_a_defect_is_not_hidden(monkeypatch):
    def main(argv: list[str]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["job.py"])
    with pytest.raises(ZeroDivisionError):
        cli.run(main)
