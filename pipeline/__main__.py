"""The command `u2pl`: `u2pl train --split 1_2` is `python -m pipeline train --split 1_2` and jobs/train.py.

A Python that is too old reads this file, too: it learns in one line what is wrong.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

OLDEST = (3, 10)
"""The oldest supported Python."""


def main() -> NoReturn:
    """The program u2pl: runs the command that the first word names, and ends the process."""
    _end_with(first_word)


def run(name: str) -> NoReturn:
    """A script of jobs/: runs one command, and ends the process."""
    _end_with(lambda: command(name))


def _end_with(call: "Callable[[], NoReturn]") -> NoReturn:
    """Ends the process with the exit code of what `call` raises, whatever threads it has left."""
    try:
        call()
    except SystemExit as end:
        _leave(end.code)
    except KeyboardInterrupt:  # while modules are imported
        _leave(130)
    except BaseException:  # a fault of the program
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        _leave(1)


def first_word() -> NoReturn:
    """Runs the command that the first word of `sys.argv` names, as `command` does; the others are its flags."""
    _, *words = sys.argv
    name, flags = (words[0], words[1:]) if words else ("--help", [])
    sys.argv = ["u2pl" if name.startswith("-") else f"u2pl {name}", *flags]  # as messages and usage show it
    command(name)


def command(name: str) -> NoReturn:
    """Runs one command with the flags in `sys.argv`.

    Args:
        name: a name of `pipeline.commands.COMMANDS`, or `--help` or `--version`.

    Raises:
        SystemExit: it has ended, with its exit code.
    """
    program = sys.argv[0].rpartition("/")[2]
    if sys.version_info < OLDEST:
        print(f"{program}: Python {sys.version.split()[0]} ({sys.executable}) is too old; {_remedy()}", file=sys.stderr)
        sys.exit(2)
    try:
        from pipeline.config import cli

        cli.run(lambda argv: _call(name, argv))
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing == "pipeline":
            raise
        print(f"{program}: {sys.executable} has no module {missing!r}; {_remedy()}", file=sys.stderr)
        sys.exit(2)


def _call(name: str, argv: "list[str]") -> None:
    from pipeline import commands  # late: packages that bring methods are asked, and one that is broken is told

    commands.call(name, argv)


def _leave(code: object) -> NoReturn:
    """Ends the process with the code of a SystemExit, without the interpreter's own end.

    A thread of Arrow's that lets go of a Python buffer meanwhile would call std::terminate there, as the interpreter
    ends such threads in the midst of a C++ destructor: 134 instead of the right code, in every fourth run under load.
    What programs leave for their end is done before: `atexit` ends Ray and removes temporary files.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or its reader has gone
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _remedy() -> str:
    return (
        "activate the environment that has the package (source .venv/bin/activate), "
        "on a cluster before `ray start` on every node"
    )


if __name__ == "__main__":
    main()
