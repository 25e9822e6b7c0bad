"""The command `u2pl`: `u2pl train --split 1_2` is `python -m pipeline train --split 1_2` and jobs/train.py.

A Python that is too old reads this file, too: it learns in one line what is wrong.
"""

import sys
from typing import NoReturn

OLDEST = (3, 10)
"""The oldest supported Python."""


def main() -> NoReturn:
    """Runs the command that the first word names; the others are its flags."""
    _, *words = sys.argv
    name, flags = (words[0], words[1:]) if words else ("--help", [])
    sys.argv = ["u2pl" if name.startswith("-") else f"u2pl {name}", *flags]  # as messages and usage show it
    run(name)


def run(name: str) -> NoReturn:
    """Runs one command with the flags in `sys.argv` and ends the process with its exit code.

    Args:
        name: a name of `pipeline.commands.COMMANDS`, or `--help` or `--version`.
    """
    program = sys.argv[0].rpartition("/")[2]
    if sys.version_info < OLDEST:
        print(f"{program}: Python {sys.version.split()[0]} ({sys.executable}) is too old; {_remedy()}", file=sys.stderr)
        sys.exit(2)
    try:
        from pipeline import commands
        from pipeline.config import cli

        cli.run(lambda argv: commands.call(name, argv))
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing == "pipeline":
            raise
        print(f"{program}: {sys.executable} has no module {missing!r}; {_remedy()}", file=sys.stderr)
        sys.exit(2)


def _remedy() -> str:
    return (
        "activate the environment that has the package (source .venv/bin/activate), "
        "on a cluster before `ray start` on every node"
    )


if __name__ == "__main__":
    main()
