"""U2PL on Ray: semi-supervised semantic segmentation, from object storage to an evaluated checkpoint.

What people use from Python or a notebook; everything is imported when it is first used:

- `make_config(values, preset=..., file=...)` and `Config`: what one run is told.
- `train(config)`: trains on the Ray cluster of this machine or a private one; `METHODS` are the systems by name.
- `load_model(run)`: the trained network; `model.predict(image)` gives class ids.
- `open_dataset(uri)`: a prepared dataset.
- `UserError`: what all of them raise if the caller can mend it; its message is one line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.datasets.prepared.dataset import open_dataset
    from pipeline.errors import UserError
    from pipeline.inference.load import load_model
    from pipeline.methods import METHODS, make_config
    from pipeline.training.launch import launch as train

__version__ = "0.1.0"
__all__ = ["METHODS", "Config", "UserError", "load_model", "make_config", "open_dataset", "train"]
_HOMES = {
    "Config": ("pipeline.config.schema", "Config"),
    "METHODS": ("pipeline.methods", "METHODS"),
    "UserError": ("pipeline.errors", "UserError"),
    "load_model": ("pipeline.inference.load", "load_model"),
    "make_config": ("pipeline.methods", "make_config"),
    "open_dataset": ("pipeline.datasets.prepared.dataset", "open_dataset"),
    "train": ("pipeline.training.launch", "launch"),
}
"""Module and name there, by public name."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, own = _HOMES[name]
    return getattr(import_module(module), own)


def __dir__() -> "list[str]":  # quoted: an old Python reads this file, too
    return [*globals(), *_HOMES]
