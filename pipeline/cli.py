"""The command line of every job: flags from the config's dataclasses, and exit codes.

0 done, 2 user error (one line on stderr, no traceback), 1 failure.
"""

import argparse
import ast
import dataclasses
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from pipeline import config as configs
from pipeline.config import Config
from pipeline.errors import RunError, UserError
from pipeline.typed import build, convert, is_list, suggest

_SHORT = {"data.root": ["--data"]}
"""Flags that have a short form beside their dotted name."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s and whose flags are never abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the whole usage."""
        raise UserError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses all of `argv`.

        Raises:
            UserError: an argument is unknown (the nearest flag is named), missing or of the wrong type.
        """
        values, unknown = self.parse_known_args(argv)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            near = suggest(unknown[0].partition("=")[0], known)
            raise UserError(f"unknown argument {unknown[0]!r}{near if 'did you mean' in near else '; see --help'}")
        return values


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a job's `main` and ends the process with the right code."""
    try:
        main(sys.argv[1:])
        code = 0
    except (UserError, RunError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def parse_config(
    argv: Sequence[str],
    description: str,
    options: Mapping[str, type],
    extra: Callable[[Parser], None] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Reads a run's config: defaults < `--preset` < `--config` < flags.

    With neither a preset, a file nor a dataset, the `demo` preset holds.

    Args:
        argv: the arguments without the program's name.
        description: what the job does, for `--help`.
        options: dataclass of options by method name.
        extra: adds the job's own flags.

    Returns:
        The checked config, and the namespace with the job's own flags.

    Raises:
        UserError: an unknown flag, key, preset or method, or a value of the wrong type.
    """
    parser = _parser(description, options)
    if extra:
        extra(parser)
    args = parser.parse(argv)
    values: dict[str, Any] = {}
    preset = args.preset or (None if args.config or vars(args)["data.root"] else "demo")
    for layer in (
        configs.read_preset(preset) if preset else {},
        configs.read_file(args.config) if args.config else {},
        _nested({key: value for key, value in vars(args).items() if value is not None and _is_path(key, options)}),
    ):
        values = configs.merge(values, layer)
    result = resolve(values, options)
    if args.print_config:
        print(configs.to_yaml(result), end="")
        sys.exit(0)
    return result, args


def _is_path(key: str, options: Mapping[str, type]) -> bool:
    """Whether an argument's name is a place in the config; the others are the job's own flags."""
    section = key.partition(".")[0]
    return section in options or section in {f.name for f in dataclasses.fields(Config)} - {"methods"}


def resolve(values: Mapping[str, Any], options: Mapping[str, type]) -> Config:
    """A config of plain values, with every method's options checked and completed.

    Options stand at the top level under the method's name (`u2pl: {lambda_c: 0.1}`) or below `methods`.
    """
    values = dict(values)
    given = {name: _section(values.pop(name, None), name) for name in options}
    stored = _section(values.pop("methods", None), "methods")
    named = str(values.get("method", Config.method))
    unknown = [name for name in [named, *stored] if name not in options]
    if unknown:
        raise UserError(f"unknown method {unknown[0]!r}{suggest(str(unknown[0]), sorted(options))}")
    near = [name for name in values if name not in {f.name for f in dataclasses.fields(Config)}]
    if near:
        valid = [f.name for f in dataclasses.fields(Config)] + sorted(options)
        raise UserError(f"unknown key {near[0]!r}{suggest(str(near[0]), valid)}")
    methods = {
        name: configs.as_dict(convert(kind, configs.merge(_section(stored.get(name), name), given[name]), name))
        for name, kind in options.items()
    }
    return build(Config, {**values, "methods": methods})


def _section(value: Any, name: str) -> Mapping[str, Any]:
    return convert(Mapping[str, Any], value, name)


def _parser(description: str, options: Mapping[str, type]) -> Parser:
    parser = Parser(description=description, usage="%(prog)s [--preset NAME] [--split SPLIT] [--SECTION.KEY VALUE ...]")
    parser.add_argument("--preset", help=f"named values: {', '.join(configs.presets())}")
    parser.add_argument("--config", metavar="FILE", help="YAML file (path or URI); flags override it")
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and stop")
    _add_fields(parser, Config, "")
    hints = get_type_hints(Config)
    for name, kind in hints.items():
        if dataclasses.is_dataclass(kind):
            _add_fields(parser.add_argument_group(name, inspect.getdoc(kind)), kind, f"{name}.")
    for name, kind in options.items():
        if dataclasses.fields(kind):
            _add_fields(parser.add_argument_group(name, inspect.getdoc(kind)), kind, f"{name}.")
    return parser


def _add_fields(parser: Any, kind: Any, prefix: str) -> None:
    docs, hints = field_docs(kind), get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint) or item.default is dataclasses.MISSING:
            continue
        bare = {"nargs": "?", "const": "true"} if hint is bool else {"nargs": "*"} if is_list(hint) else {}
        path = prefix + item.name
        text = f"{docs.get(item.name, '')} (default: {item.default})".replace("%", "%%")
        parser.add_argument(f"--{path}", *_SHORT.get(path, []), dest=path, metavar=_type_name(hint), help=text, **bare)


def _type_name(hint: Any) -> str:
    text = str(hint).replace("typing.Literal", "").replace(" | None", "").replace("'", "")
    return text if "[" in text else getattr(hint, "__name__", text)


@cache
def field_docs(kind: type) -> dict[str, str]:
    """The string that stands below each field of a dataclass, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    docs = {}
    for field, below in pairwise(getattr(definition, "body", [])):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def _nested(flags: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flags.items():
        section, dot, key = path.rpartition(".")
        if dot:
            nested.setdefault(section, {})[key] = value
        else:
            nested[path] = value
    return nested
