"""Completion as a shell does it: bash and, where it is installed, zsh read the script and ask the real command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.commands import COMMANDS
from pipeline.commands.completion import script
from pipeline.config import cli
from pipeline.errors import UserError

ASK = """
u2pl() { "$PYTHON" -m pipeline "$@"; }
COMP_WORDS=($WORDS "$LAST")
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
_u2pl
echo "${COMPREPLY[@]}"
"""


def completed(shell: str, folder: Path, words: str) -> list[str]:
    """What the script offers for the last word of a line; it is empty behind a blank."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell}: apt-get install {shell}; what bash offers for the same words was checked")
    file, (before, _, last) = folder / "script", words.rpartition(" ")
    file.write_text(script(shell, [*COMMANDS]))
    flags = ["--norc", "-c"] if shell == "bash" else ["-f", "-c"]
    arrays = "setopt ksharrays shwordsplit; " if shell == "zsh" else ""  # as its bashcompinit sets them
    own = {"PYTHON": sys.executable, "WORDS": before, "LAST": last, "HOME": str(folder)}
    done = subprocess.run(
        [program, *flags, f". {file}; {arrays}{ASK}"],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=True,
    )
    return [word for word in done.stdout.split() if word.startswith(last)]  # zsh itself leaves out the others


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("u2pl ev", ["evaluate"]),
        ("u2pl train --optim.st", ["--optim.steps"]),
        ("u2pl train --split 1_2 --method cu", ["cutmix_seg"]),
        ("u2pl train --preset voc_c", ["voc_classic"]),
        ("u2pl train --optim.optimizer ", ["sgd", "adamw"]),
        ("u2pl evaluate --mode s", ["sliding"]),
        ("u2pl prepare --source sh", ["shapes"]),
        ("u2pl train --nothing.of.this ", []),
    ],
)
def test_words(shell, words, offered, tmp_path):
    assert completed(shell, tmp_path, words) == offered


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_its_flags_and_does_nothing(name, capsys):
    with pytest.raises(SystemExit) as ended:
        COMMANDS[name]([cli.FLAGS_FLAG])
    assert ended.value.code == 0
    assert "--help" in capsys.readouterr().out.split()


def test_another_shell_is_refused():
    with pytest.raises(UserError, match="--completion fish: expected bash or zsh"):
        script("fish", [])
