"""The code of the systems of the comparison. Adding one: a file here, its options and a line in `config/methods.py`."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from pipeline.config import cli
from pipeline.config.backbones import check_crop
from pipeline.config.methods import OPTIONS, SPECS, check_classes, check_durations
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.methods.base import Losses, Method, Predictor, Step


class _Classes(Mapping[str, type[Method]]):
    """The class of each method, imported when it is asked for.

    Raises:
        UserError: the module of a method cannot be imported, or has no such class.
    """

    def __getitem__(self, name: str) -> type[Method]:
        module, _, own = SPECS[name].code.partition(":")
        try:
            kind: type[Method] = getattr(import_module(module), own)
        except (ImportError, AttributeError) as error:
            raise UserError(f"method {name}: {error}; mend its package, or uninstall it") from error
        return kind

    def __iter__(self) -> Iterator[str]:
        return iter(SPECS)

    def __len__(self) -> int:
        return len(SPECS)


METHODS: Mapping[str, type[Method]] = _Classes()
"""By name, in the order of `SPECS`."""


def make_config(
    values: Mapping[str, Any] | None = None, *, preset: str | None = None, file: str | None = None
) -> Config:
    """A checked config of defaults < preset < file < values, as the command line makes one.

    Args:
        values: by dotted key, as flags have them (`{"method": "suponly", "optim.lr": 0.01}`), or by section.
        preset: name of a preset, such as `demo`.
        file: path or URI of a YAML file.

    Raises:
        UserError: an unknown key, preset or method, or a value of the wrong type; the message names the nearest.
    """
    return cli.resolve(cli.layered(values or {}, preset=preset, file=file), OPTIONS)


def build_method(config: Config, num_classes: int) -> Method:
    """The method that the config names, with freshly initialised networks.

    Raises:
        UserError: an option does not fit the run, the classes or the network.
    """
    check_classes(config, num_classes)
    check_durations(config)
    check_crop(config.data.crop, config.model.backbone)
    return METHODS[config.method](config, num_classes)


__all__ = [
    "METHODS",
    "OPTIONS",
    "Losses",
    "Method",
    "Predictor",
    "Step",
    "build_method",
    "make_config",
]
