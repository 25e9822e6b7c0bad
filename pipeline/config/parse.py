"""From texts to typed values: YAML as people mean it, and frozen dataclasses out of plain values.

YAML is read by PyYAML without the conversions of YAML 1.1 that spoil names of splits.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pipeline.errors import UserError

# ---- plain values to dataclasses --------------------------------------------------------------------------------


def require_positive(section: str, values: Any, *names: str) -> None:
    """Checks that fields (numbers or tuples of them) are above 0.

    Raises:
        UserError: one is not.
    """
    _require(section, values, names, lambda value: value > 0, "above 0")


def require_share(section: str, values: Any, *names: str) -> None:
    """Checks that fields are in 0..1.

    Raises:
        UserError: one is not.
    """
    _require(section, values, names, lambda value: 0 <= value <= 1, "between 0 and 1")


def _require(section: str, values: Any, names: Sequence[str], fits: Callable[[Any], bool], what: str) -> None:
    for name in names:
        value = getattr(values, name)
        if not all(map(fits, value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{section}.{name}: must be {what}, got {value}")


LISTED = 30
"""Names in an error line at most."""


def suggest(name: str, valid: list[str]) -> str:
    """The end of an error line: the nearest valid name, or all of them; of more than `LISTED` the first ones."""
    near = difflib.get_close_matches(name, valid, n=1)
    more = f" and {len(valid) - LISTED} more" if len(valid) > LISTED else ""
    return f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(valid[:LISTED])}{more}"


def build(kind: type[Any], values: Mapping[str, Any], where: str = "") -> Any:
    """Makes the dataclass `kind` of plain values, checked field by field.

    Args:
        kind: a frozen dataclass whose fields are scalars, tuples of scalars, or such dataclasses.
        values: what YAML, flags or a dumped config say; missing fields keep their defaults.
        where: dotted path of this section, for messages.

    Raises:
        UserError: an unknown key (the nearest valid one is named) or a value of the wrong type.
    """
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    checked = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in names:
            raise UserError(f"unknown key {path!r}{suggest(str(key), names)}")
        checked[key] = convert(hints[key], value, path)
    return kind(**checked)


def convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint` of the field `path`.

    Raises:
        UserError: it is not of that type.
    """
    if dataclasses.is_dataclass(hint):
        return build(hint, _mapping(value, path), path)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return convert(next(arg for arg in args if arg is not type(None)), value, path)
    if origin is Literal:
        return _choice(args, value, path)
    if is_list(hint):
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise UserError(f"{path}: expected values like a,b or [a, b], got {value!r}")
        return tuple(convert(args[0], part, path) for part in parts)
    if origin is tuple:
        if isinstance(value, list) and len(value) == 1:  # a flag that was given 64,64 or 64x64 instead of 64 64
            (value,) = value
        parts = value.replace("x", ",").split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or len(parts) != len(args):
            raise UserError(f"{path}: expected {len(args)} values like 1,2, got {value!r}")
        return tuple(convert(arg, part, path) for arg, part in zip(args, parts, strict=True))
    if origin is Mapping:
        return _mapping(value, path)
    return _scalar(hint, value, path)


def is_list(hint: Any) -> bool:
    """Whether `hint` is a tuple of any length."""
    return get_origin(hint) is tuple and get_args(hint)[-1] is ...


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if value is None:  # a section whose lines are all commented out
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: expected keys and values, got {value!r}")
    return value


def _choice(allowed: tuple[Any, ...], value: Any, path: str) -> Any:
    for option in allowed:
        if str(value) == str(option):
            return option
    raise UserError(f"{path}: {value!r} is not known{suggest(str(value), [str(option) for option in allowed])}")


def _scalar(hint: type, value: Any, path: str) -> Any:
    text = str(value).strip()
    try:
        if value is None or isinstance(value, Mapping | list | tuple):
            raise ValueError(text)
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        if hint is str:
            return text
        number = _whole(text) if hint is int else hint(text)
        if "_" in text or not 0 <= number < math.inf:  # int("1_2") is 12; nothing here may be negative
            raise ValueError(text)
        return number
    except (ValueError, KeyError):
        wanted = {"int": "a whole number from 0 on", "float": "a number from 0 on", "bool": "true or false"}
        raise UserError(f"{path}: expected {wanted.get(hint.__name__, 'a text')}, got {value!r}") from None


def _whole(text: str) -> int:
    """The whole number that a text such as `45600` or `1e3` writes.

    Raises:
        ValueError: it writes none.
    """
    if "e" not in text.lower():
        return int(text)
    number = float(text)
    if not number.is_integer():  # nor is infinity
        raise ValueError(text)
    return int(number)


# ---- YAML -------------------------------------------------------------------------------------------------------


MAX_YAML_BYTES = 1 << 20


class _Yaml12Loader(yaml.SafeLoader):
    """YAML 1.1 reads the unquoted `1_2` as the integer 12; as YAML 1.2 does, this loader reads it as a string."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuses aliases: a few lines of them can stand for gigabytes."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases like *{self.peek_event().anchor} are not allowed")
        return super().compose_node(parent, index)


_Yaml12Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] in ("bool", "null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Reads a YAML mapping; numbers stay strings until a field says what they are, so `1_2` stays a split.

    Raises:
        UserError: not YAML, or not a mapping.
    """
    try:
        values = yaml.load(text, Loader=_Yaml12Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply; this is no config file") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected keys and values at the top")
    return values
