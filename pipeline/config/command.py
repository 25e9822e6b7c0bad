"""The command that trains what a config says."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.cli import Sections, flag_names, layered, resolve
from pipeline.config.schema import Config, as_dict, presets

_SAID = ("method", "split", "seed", "data.root")
"""Keys that a command names whatever the preset says."""


def command(config: Config, options: Sections) -> str:
    """The command, for a shell: the preset that leaves the fewest flags, and those flags.

    The run directory is not among them, so that the command begins a run of its own.

    Args:
        config: of a run, its places absolute.
        options: sections by method name.
    """
    wanted = dict(_flat(as_dict(config)))
    name, left_out = "train", {"out"}
    if config.data.pseudo_labels:  # the student of the recipe, which makes teacher and labels itself
        name, left_out = "self_training", {"out", "method", "data.pseudo_labels"}
    tried = []
    for preset in (None, *presets()):
        given = dict(_flat(as_dict(resolve(layered({"method": config.method}, preset=preset), options))))
        keys = [key for key in wanted if key not in left_out and (key in _SAID or wanted[key] != given[key])]
        tried.append([*([f"--preset {preset}"] if preset else []), *(_flag(key, wanted[key]) for key in keys)])
    return " ".join(["u2pl", name, *min(tried, key=len)])


def _flag(key: str, value: Any) -> str:
    words = value if isinstance(value, list) else [value]
    return " ".join([flag_names(key)[0], *(shlex.quote(_word(each)) for each in words)])


def _word(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
