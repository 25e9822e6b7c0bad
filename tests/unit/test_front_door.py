"""What people meet first: `import pipeline`, the command `u2pl`, jobs/, and a Python that lacks the packages."""

import ast
import re
import subprocess
import sys

import pytest

import pipeline
from pipeline import commands
from pipeline.__main__ import first_word
from pipeline.methods import METHODS
from tests.docs import ROOT

JOBS = {file.stem: file for file in (ROOT / "jobs").glob("[!_]*.py")}


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)  # type: ignore


def test_the_names_are_imported_when_they_are_used() -> None:
    code = "import sys, pipeline; print('torch' in sys.modules, [hasattr(pipeline, name) for name in pipeline.__all__])"
    assert run(sys.executable, "-c", code).stdout == f"False {[True] * len(pipeline.__all__)}\n"
    assert pipeline.METHODS is METHODS
    assert set(pipeline.__all__) <= set(dir(pipeline))
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'tran'"):
        _ = pipeline.tran


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--help"], "usage: u2pl train"),
        (["train", "--optim.lrr", "1"], "did you mean --optim.lr?"),
        (["train", "--u2pl.lambda_cc", "1"], "did you mean --u2pl.lambda_c?"),
        (["sweep", "--print_config"], "method: u2pl"),
        (["evaluate"], "the following arguments are required: checkpoint"),
        (["evaluate", "nowhere"], "nowhere: no checkpoint"),
        (["report", "nowhere"], "nowhere: no run"),
        (["train", "--data", "nowhere", "--split", "1_2"], "nowhere: no dataset there"),
    ],
)
def test_an_answer_does_not_wait_for_torch(argv: list[str], said: str) -> None:
    words = ["u2pl", *argv]
    code = (
        "import atexit, sys, pipeline.__main__ as main; atexit.register(lambda: print('torch' in sys.modules)); "
        f"sys.argv = {words}; main.main()"
    )
    done = run(sys.executable, "-c", code)
    assert said in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_drivers_of_runs_and_sweeps_need_no_torch() -> None:
    """They live as long as the run: without torch one is 400 MB smaller, and a head has one for each trial."""
    driving = "pipeline.training.launch, pipeline.sweep.run, pipeline.sweep.search, pipeline.sweep.tune"
    assert run(sys.executable, "-c", f"import sys, {driving}; print('torch' in sys.modules)").stdout == "False\n"


def test_what_only_some_networks_need_is_not_imported_for_the_flags() -> None:
    slow = "[name for name in ('torchvision', 'torch._dynamo') if name in sys.modules]"
    code = f"import sys, pipeline.methods, pipeline.training.trainer; print({slow})"
    assert run(sys.executable, "-c", code).stdout == "[]\n"


def test_a_config_from_python_is_the_one_of_the_command_line() -> None:
    config = pipeline.make_config({"method": "cps", "optim.lr": 0.5, "cps": {"cutmix": False}}, preset="demo")
    assert (config.method, config.optim.lr, config.model.backbone) == ("cps", 0.5, "tiny")
    assert config.options["cps"].cutmix is False
    with pytest.raises(pipeline.UserError, match=r"unknown key 'optim\.lrr'; did you mean lr\?"):
        pipeline.make_config({"optim.lrr": 0.5})


def test_help_names_every_command_and_every_command_is_a_job(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["u2pl"])
    with pytest.raises(SystemExit) as ended:
        first_word()
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert re.findall(r"^  (\w+) +\S", said, re.MULTILINE) == list(commands.COMMANDS)
    assert JOBS.keys() == commands.COMMANDS.keys()


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["trian"], 2, "u2pl trian: no command 'trian'; did you mean train?\n"),
        (["train", "--optim.lrr", "1"], 2, "u2pl train: unknown argument '--optim.lrr'; did you mean --optim.lr?\n"),
        (["self-training", "stray"], 2, "u2pl self-training: unknown argument 'stray'; see --help\n"),
        (["submit"], 2, "u2pl submit: no command given after --, such as: u2pl submit -- train --split 1_2\n"),
        (["--version"], 0, ""),
    ],
)
def test_its_lines_name_the_command(monkeypatch, capsys, argv: list[str], code: int, said: str) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/u2pl", *argv])
    with pytest.raises(SystemExit) as ended:
        first_word()
    assert (ended.value.code, capsys.readouterr().err) == (code, said)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_a_command_and_nothing_else(name: str) -> None:
    text = JOBS[name].read_text()
    assert len(text.splitlines()) <= 10
    assert f'run("{name}")' in text


def test_a_job_runs_from_anywhere_and_by_its_own_name(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(JOBS["train"]), "--presett"], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert (done.returncode, done.stderr) == (2, "train.py: unknown argument '--presett'; did you mean --preset?\n")


@pytest.mark.parametrize("command", [["jobs/train.py"], ["-m", "pipeline", "train"]])
def test_a_python_without_the_packages_is_told_so_in_one_line(command: list[str]) -> None:
    done = run(sys.executable, "-S", *command)  # -S: nothing that was installed is found
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(r"(train\.py|u2pl train): \S+python\S* has no module '\w+'; activate the environment", line)
    assert "before `ray start` on every node" in line


def test_a_missing_module_of_our_own_is_no_mistake_of_the_user(monkeypatch) -> None:
    def broken(argv: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'pipeline.gone'", name="pipeline.gone")

    monkeypatch.setitem(commands.COMMANDS, "train", broken)
    monkeypatch.setattr(sys, "argv", ["u2pl", "train"])
    with pytest.raises(ModuleNotFoundError):
        first_word()


@pytest.mark.parametrize("name", ["pipeline/__init__.py", "pipeline/__main__.py", "jobs/_run.py"])
def test_a_python_that_is_too_old_can_read_what_says_so(name: str) -> None:
    """It evaluates annotations when it reads them: `list[str]` and `int | str` are errors to it unless they are quoted.

    No such Python is at hand where these tests run.
    """
    tree = ast.parse((ROOT / name).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    arguments = [argument.annotation for function in functions for argument in function.args.args]
    notes = [note for note in (*arguments, *(function.returns for function in functions)) if note is not None]
    late = [
        ast.unparse(note) for note in notes if any(isinstance(n, ast.Subscript | ast.BitOr) for n in ast.walk(note))
    ]
    assert late == []
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Match)]
