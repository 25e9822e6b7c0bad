"""The systems of the comparison. Adding one: a file here and a line in `METHODS`."""

from pipeline.config import Config
from pipeline.methods.base import Losses, Method, Predictor, Step
from pipeline.methods.suponly import SupOnly
from pipeline.methods.u2pl import U2PL

METHODS: dict[str, type[Method]] = {
    "suponly": SupOnly,
    "u2pl": U2PL,
}
OPTIONS: dict[str, type] = {name: method.Options for name, method in METHODS.items()}


def build_method(config: Config, num_classes: int) -> Method:
    """The method that the config names, with freshly initialised networks."""
    return METHODS[config.method](config, num_classes)


__all__ = ["METHODS", "OPTIONS", "Losses", "Method", "Predictor", "Step", "build_method"]
