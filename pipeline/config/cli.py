"""The command line of every job: flags from the config's dataclasses, and exit codes.

0 done, 2 user error (one line on stderr, no traceback), 1 failure, 128 + N ended by signal N.
"""

import argparse
import ast
import dataclasses
import inspect
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from pipeline.config import schema as configs
from pipeline.config.hints import hint
from pipeline.config.parse import build, convert, is_list, suggest
from pipeline.config.schema import Config
from pipeline.errors import RunError, Stopped, UserError

_SHORT = {
    "data.root": "--data",
    "data.crop": "--crop",
    "optim.lr": "--lr",
    "optim.steps": "--steps",
    "scaling.workers": "--workers",
}
"""Flags that have a short form beside their dotted name."""
_BATCH = ("optim.batch_labeled", "optim.batch_unlabeled")
"""The keys of `--batch`."""
_FIELDS = tuple(item.name for item in dataclasses.fields(Config) if item.name != "options")
Sections = Mapping[str, Mapping[str, type]]
"""Sections of options by method name, each a dataclass by its name: `pipeline.config.options.OPTIONS`.

A dataclass may list keys of other sections that its method does not read, as a class variable `ignored`."""
COMMON = (
    *("method", "split", "seed", "out", "data.root", "data.unlabeled_pools", "data.protocol", "data.crop"),
    *("model.backbone", "model.weights", "optim.lr", "optim.steps", "optim.batch_labeled", "optim.batch_unlabeled"),
    *("eval.every", "scaling.workers", "run.precision", "run.checkpoint_every"),
)
"""The keys that `--help` shows; `--help all` shows every key."""


FLAGS_FLAG = "--flags_for_completion"
"""Asks a command for its flags, one a line with the values that each may have; for the shell, so no help shows it."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s and whose flags are never abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.known: dict[str, Sequence[str]] = {}
        """Values of flags that may have others, too, by the flag's key; for completion."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the whole usage."""
        raise UserError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses all of `argv`.

        Raises:
            UserError: an argument is unknown (the nearest flag is named), missing or of the wrong type.
        """
        if [*argv] == [FLAGS_FLAG]:
            print("\n".join(self._completions()))
            sys.exit(0)
        values, unknown = self.parse_known_args(argv)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            raise UserError(f"unknown argument {unknown[0]!r}{hint(unknown[0], known) or '; see --help'}")
        return values

    def _completions(self) -> list[str]:
        """Each flag, and behind it the values that it may have."""
        return [
            " ".join([flag, *map(str, each.choices or self.known.get(each.dest) or _alternatives(each.metavar))])
            for each in self._actions
            for flag in each.option_strings
            if flag.startswith("--")
        ]

    def own_flags(self) -> list[tuple[str, str]]:
        """The flags that are no key of the config, each with its help."""
        return [
            (" ".join([each.option_strings[-1], str(each.metavar or "")]).strip(), str(each.help))
            for each in self._actions
            if "." not in each.dest and each.dest not in _FIELDS
        ]


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a job's `main` and ends the process with the right code; SIGTERM is told, as Ctrl-C is."""
    program = Path(sys.argv[0]).name
    received: list[Stopped] = []

    def on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
        del frame
        received.append(Stopped("ended by SIGTERM", number))
        raise received[-1]

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        main(sys.argv[1:])
        code = 0
    except (UserError, RunError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt as error:
        stop = error if isinstance(error, Stopped) else received.pop() if received else None
        if stop:
            print(f"{program}: {stop}", file=sys.stderr)
        code = 128 + (stop.number if stop else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code)


def parse_config(
    argv: Sequence[str], description: str, options: Sections, extra: Callable[[Parser], None] | None = None
) -> tuple[Config, argparse.Namespace]:
    """Reads a run's config; takes and raises what `parse_values` does.

    Returns:
        The checked config, and the namespace with the job's own flags.
    """
    values, args = parse_values(argv, description, options, extra)
    return resolve(values, options), args


def parse_values(
    argv: Sequence[str],
    description: str,
    options: Sections,
    extra: Callable[[Parser], None] | None = None,
    methods: Callable[[argparse.Namespace], Sequence[str]] | None = None,
) -> tuple[dict[str, Any], argparse.Namespace]:
    """Reads what a run is told: defaults < `--preset` < `--config` < flags.

    With neither a preset, a file nor a dataset, the `demo` preset holds.

    Args:
        argv: the arguments without the program's name.
        description: what the job does, for `--help`.
        options: sections by method name, each a dataclass by its name.
        extra: adds the job's own flags.
        methods: which methods the job runs by its own flags; None: the one of the config.

    Returns:
        Plain values by section, which `resolve` makes a config of, and the namespace with the job's own flags.

    Raises:
        UserError: an unknown flag, key, preset or method, a value of the wrong type, or a flag of another method.
    """
    parser = _parser(description, options)
    if extra:
        extra(parser)
    if any(word in ("-h", "--help") for word in argv):
        _print_help(parser, argv, options)
        sys.exit(0)
    args = parser.parse(argv)
    values = _values_of(args, options)
    named = methods(args) if methods else []
    if len(named) == 1:
        values["method"] = named[0]
    result = resolve(values, options)
    _refuse_foreign(args, named or [result.method], options)
    if args.print_config:
        print(configs.to_yaml(result), end="")
        sys.exit(0)
    return values, args


def _flags_of(args: argparse.Namespace, options: Sections) -> dict[str, Any]:
    """The flags that are keys of the config; the others are the command's own."""
    places = {*_FIELDS, *_sections(options)}
    own = {key: value for key, value in vars(args).items() if value is not None and key.partition(".")[0] in places}
    return {**({} if args.batch is None else dict.fromkeys(_BATCH, args.batch)), **own}


def _values_of(args: argparse.Namespace, options: Sections) -> dict[str, Any]:
    """The values of the flags, with those of the file and preset below them."""
    flags = _flags_of(args, options)
    preset = args.preset or (None if args.config or "data.root" in flags else "demo")
    return layered(flags, preset=preset, file=args.config)


def _refuse_foreign(args: argparse.Namespace, methods: Sequence[str], options: Sections) -> None:
    """Refuses flags that none of the methods reads. A preset or file may hold sections of many methods."""
    for key in _flags_of(args, options):
        section = key.partition(".")[0]
        if section in _sections(options) and not any(_reads(options.get(method, {}), key) for method in methods):
            raise UserError(f"--{key}: method {', '.join(methods)} has no such option; see --help, or leave it out")


def _reads(own: Mapping[str, type], key: str) -> bool:
    """Whether a method with these sections of options reads the option `key` of a method."""
    ignored = [each for kind in own.values() for each in getattr(kind, "ignored", ())]
    return key.partition(".")[0] in own and key not in ignored


def layered(values: Mapping[str, Any], *, preset: str | None = None, file: str | None = None) -> dict[str, Any]:
    """Plain values by section of preset < file < values.

    Args:
        values: by dotted key (`optim.lr`), or by section with keys and values below it.
        preset: name of a preset.
        file: path or URI of a YAML file.

    Raises:
        UserError: an unknown preset, no file there, or none that can be read.
    """
    merged: dict[str, Any] = {}
    layers = (configs.read_preset(preset) if preset else {}, configs.read_file(file) if file else {}, _nested(values))
    for layer in layers:
        merged = configs.merge(merged, layer)
    return merged


def _sections(options: Sections) -> dict[str, type]:
    """All sections of options, of whatever method."""
    return {name: kind for read in options.values() for name, kind in read.items()}


def resolve(values: Mapping[str, Any], options: Sections) -> Config:
    """A config of plain values, with the options of its method.

    Args:
        values: by section; options stand at the top level under the method's name (`u2pl: {lambda_c: 0.1}`). Those of
            other methods are checked and left out, so that one file serves them all.
        options: sections by method name, each a dataclass by its name.

    Raises:
        UserError: an unknown key or method, or a value of the wrong type.
    """
    values, known = dict(values), _sections(options)
    if "methods" in values:
        raise UserError("methods: written by an older version, whose runs this one does not read; train anew")
    given = {name: convert(known[name], values.pop(name), name) for name in [*values] if name in known}
    method = str(values.get("method", Config.method))
    if method not in options:
        raise UserError(f"unknown method {method!r}{suggest(method, sorted(options))}")
    for key in values:
        if key not in _FIELDS:
            raise UserError(f"unknown key {key!r}{suggest(str(key), [*_FIELDS, *sorted(known)])}")
    chosen = {name: given.get(name) or kind() for name, kind in options[method].items()}
    return build(Config, {**values, "options": chosen})


def _parser(description: str, options: Sections) -> Parser:
    usage = "%(prog)s [--preset NAME] [--split SPLIT] [--SECTION.KEY VALUE ...]"
    parser = Parser(description=description, usage=usage, add_help=False, formatter_class=_Formatter)
    parser.add_argument("-h", "--help", nargs="?", metavar="[all]", help="this text; `--help all` shows every key")
    parser.add_argument("--preset", metavar="NAME", help=", ".join(configs.presets()))
    parser.add_argument("--config", metavar="FILE", help="YAML file (path or URI); flags override it")
    parser.add_argument("--print_config", action="store_true", help="print every key with its value and stop")
    parser.add_argument("--batch", metavar="N", help=f"{' and '.join(_BATCH)} at once")
    _add_fields(parser, Config, "")
    parser.known = {"preset": configs.presets(), "method": [*options]}
    for name, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            _add_fields(parser.add_argument_group(name, inspect.getdoc(kind)), kind, f"{name}.")
    for name, kind in _sections(options).items():
        if dataclasses.fields(kind):
            _add_fields(parser.add_argument_group(name, inspect.getdoc(kind)), kind, f"{name}.")
    return parser


def _add_fields(parser: Any, kind: Any, prefix: str) -> None:
    docs, hints = field_docs(kind), get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint) or item.default is dataclasses.MISSING:
            continue
        bare = {"nargs": "?", "const": "true"} if hint is bool else {"nargs": "*"} if get_origin(hint) is tuple else {}
        path = prefix + item.name
        text = f"{docs.get(item.name, '')} (default: {_shown(item.default) or 'none'})".replace("%", "%%")
        parser.add_argument(*flag_names(path), dest=path, metavar=_type_name(hint), help=text, **bare)


def _alternatives(metavar: Any) -> list[str]:
    """The values that a metavar such as `sgd|adamw` lists."""
    return metavar.split("|") if isinstance(metavar, str) and "|" in metavar else []


def flag_names(path: str) -> list[str]:
    """The flags of a key, the short one first."""
    return [*filter(None, [_SHORT.get(path)]), f"--{path}"]


class _Formatter(argparse.HelpFormatter):
    """Shows a flag that takes several values, or may stand alone, as its metavar says it."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs in ("*", "?") and isinstance(action.metavar, str):
            return action.metavar
        return super()._format_args(action, default_metavar)


def _print_help(parser: Parser, argv: Sequence[str], options: Sections) -> None:
    """Help that fits on two screens, with this command line's values; or, if `all` is asked for, every key.

    Raises:
        UserError: the other flags cannot be used.
    """
    args, _ = parser.parse_known_args(argv)
    if args.help == "all":
        parser.print_help()
        return
    config = resolve(_values_of(args, options), options)
    wide = max(60, shutil.get_terminal_size().columns)
    keys = [f"{config.method}.{item.name}" for item in dataclasses.fields(options[config.method][config.method])]
    lines = [
        *textwrap.wrap(parser.format_usage().strip(), wide),
        "",
        *textwrap.wrap(str(parser.description).splitlines()[0], wide),
        "",
        *(_row(name, text, "", wide) for name, text in parser.own_flags()),
        "",
        "Methods (--method):",
        *(
            f"  {name:<14}{_first(inspect.getdoc(own[name])).partition(': ')[2]}"[:wide]
            for name, own in options.items()
        ),
        "",
        "What most runs set, with the values of this command line:",
        *(_key_row(path, config, wide) for path in COMMON),
        "",
        *([f"Of {config.method}; --method NAME --help shows those of another one:"] if keys else []),
        *(_key_row(path, config, wide) for path in keys),
    ]
    print("\n".join(lines).rstrip())


def _key_row(path: str, config: Config, wide: int) -> str:
    section, _, name = path.rpartition(".")
    holder = config.options.get(section) or (getattr(config, section) if section else config)
    text, shown = _first(field_docs(type(holder)).get(name)), _shown(getattr(holder, name))
    return _row(", ".join(flag_names(path)), text, shown, wide)


def _shown(value: Any) -> str:
    """A value as flags take it; none is empty."""
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def _row(name: str, text: str, value: str, wide: int) -> str:
    """One line of help: name, text and value. The text is shortened to fit."""
    value = f" [{value}]" if value else ""
    head = f"  {name:<28} "
    return head + textwrap.shorten(text, max(20, wide - len(head) - len(value)), placeholder=" ...") + value


def _first(doc: str | None) -> str:
    """The first sentence of a docstring."""
    return " ".join((doc or "").split()).partition(". ")[0].rstrip(".")


def _type_name(hint: Any) -> str:
    """A type as people write its values: N, NUMBER, TEXT, true|false, sgd|adamw, N,N or TEXT ... ."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(map(str, args))
    if is_list(hint):
        return f"{_type_name(args[0])} ..."
    if origin is tuple:
        return ",".join(map(_type_name, args))
    kind = next((each for each in args if each is not type(None)), hint)
    return {int: "N", float: "NUMBER", bool: "true|false"}.get(kind, "TEXT")


def field_docs(kind: type) -> dict[str, str]:
    """The string that stands below each field of a dataclass at the top of its module, on one line."""
    docs = {}
    for field, below in pairwise(_classes(kind.__module__)[kind.__name__].body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes at the top of a module, as they are written; `inspect` would read the whole file for each anew."""
    body = ast.parse(inspect.getsource(sys.modules[module])).body
    return {each.name: each for each in body if isinstance(each, ast.ClassDef)}


def _nested(flags: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flags.items():
        section, dot, key = path.rpartition(".")
        if dot:
            nested.setdefault(section, {})[key] = value
        else:
            nested[path] = value
    return nested
