"""What the package does, one function a command: `u2pl NAME`, `python -m pipeline NAME` and jobs/NAME.py run them.

Each takes the words after its name. Its docstring is its help. What is slow to import is imported once the flags have
been read.
"""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pipeline
from pipeline.commands.networks import demo, evaluate, export, predict, visualize
from pipeline.commands.training import prepare, report, search, self_training, sweep, train
from pipeline.config import cli
from pipeline.config.parse import suggest
from pipeline.errors import UserError


def submit(argv: list[str]) -> None:
    """Sends a command to a cluster and follows it to its end: u2pl submit -- train --split 1_2.

    After -- stands a command of u2pl, a script of the checkout such as jobs/train.py, or any program. The exit code is
    its own.
    """
    from pipeline.cluster.submit import LOCAL
    from pipeline.cluster.submit import submit as send

    own, command = argv, []
    if "--" in argv:
        place = argv.index("--")
        own, command = argv[:place], argv[place + 1 :]
    parser = cli.Parser(description=inspect.getdoc(submit), usage="%(prog)s [--address URL] -- train [FLAGS]")
    parser.add_argument("--address", metavar="URL", help=f"job server (default: RAY_API_SERVER_ADDRESS, or {LOCAL})")
    args = parser.parse(own)
    if not command:
        raise UserError(f"no command given after --, such as: {parser.prog} -- train --split 1_2")
    module = ["python", "-m", "pipeline"] if command[0] in COMMANDS else []
    sys.exit(send([*module, *command], args.address))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    each.__name__: each
    for each in (
        prepare,
        train,
        self_training,
        sweep,
        search,
        evaluate,
        predict,
        demo,
        export,
        report,
        visualize,
        submit,
    )
}


def call(name: str, argv: list[str]) -> None:
    """Runs a command by its name (`self-training` is `self_training`), or `--help`, `--version` or `--completion`.

    Raises:
        UserError: there is no such command, or what the command says.
        RunError: what the command says.
    """
    known = {"--help": _help, "-h": _help, "--version": _version, "--completion": _completion, **COMMANDS}
    command = known.get(name) or known.get(name.replace("-", "_"))
    if command is None:
        raise UserError(f"no command {name!r}{suggest(name, list(COMMANDS))}")
    command(argv)


def _help(argv: list[str]) -> None:
    del argv
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(inspect.getdoc(each) or '').splitlines()[0]}" for name, each in COMMANDS.items()]
    print(
        "usage: u2pl COMMAND [FLAGS]\n\nSemi-supervised semantic segmentation on Ray.\n",
        *lines,
        "\nu2pl COMMAND --help explains one. In a checkout, python jobs/COMMAND.py does the same.",
        "source <(u2pl --completion bash) completes words on TAB; zsh does, too.",
        sep="\n",
    )


def _completion(argv: list[str]) -> None:
    from pipeline.commands.completion import script

    print(script(" ".join(argv), list(COMMANDS)), end="")


def _version(argv: list[str]) -> None:
    del argv
    print(f"u2pl-ray {pipeline.__version__} ({Path(pipeline.__file__).parent})")
