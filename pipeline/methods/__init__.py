"""The systems of the comparison. Adding one: a file here, its options in `config/options.py`, a line in each table."""

from collections.abc import Mapping
from typing import Any

from pipeline.config import cli
from pipeline.config.backbones import check_crop
from pipeline.config.options import OPTIONS
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.methods.ael.ael import AEL
from pipeline.methods.base import Losses, Method, Predictor, Step
from pipeline.methods.cct import CCT
from pipeline.methods.cps import CPS
from pipeline.methods.cutmix_seg import CutMixSeg
from pipeline.methods.fixmatch import FixMatch
from pipeline.methods.gct import GCT
from pipeline.methods.mean_teacher import MeanTeacher
from pipeline.methods.pc2seg import PC2Seg
from pipeline.methods.pseudoseg import PseudoSeg
from pipeline.methods.self_training import SelfTraining
from pipeline.methods.suponly import SupOnly
from pipeline.methods.u2pl.u2pl import U2PL
from pipeline.methods.u2pl.with_ael import U2PLAEL
from pipeline.methods.unimatch import UniMatch
from pipeline.methods.unimatch_v2 import UniMatchV2
from pipeline.ops.schedules import steps_of

METHODS: dict[str, type[Method]] = {
    "suponly": SupOnly,
    "self_training": SelfTraining,
    "mean_teacher": MeanTeacher,
    "cutmix_seg": CutMixSeg,
    "cct": CCT,
    "gct": GCT,
    "cps": CPS,
    "pseudoseg": PseudoSeg,
    "pc2seg": PC2Seg,
    "ael": AEL,
    "u2pl": U2PL,
    "u2pl_ael": U2PLAEL,
    "fixmatch": FixMatch,
    "unimatch": UniMatch,
    "unimatch_v2": UniMatchV2,
}
"""In the order of the paper's tables; after U2PL what came later."""


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


def check_durations(config: Config) -> None:
    """Refuses a warm-up, ramp or start that the run does not outlast: the method would silently be another one.

    Raises:
        UserError: names the option.
    """
    total, values = config.optim.steps, {"optim.warmup": config.optim.warmup}
    for key in METHODS[config.method].durations:
        section, _, name = key.partition(".")
        values[key] = getattr(config.options[section], name)
    for key, value in values.items():
        if steps_of(value, total) >= total:
            raise UserError(
                f"{key} {value:g}: the run ends after {total} steps (optim.steps); give fewer steps, or a share of the "
                "run such as 0.3"
            )


def check_frozen(config: Config) -> None:
    """Refuses batch norms that are to be frozen and have no statistics yet.

    Raises:
        UserError: they are.
    """
    frozen = getattr(config.options[config.method], "batch_norm", None) == "frozen"
    if frozen and config.model.weights == "none":
        raise UserError(
            f"{config.method}.batch_norm frozen: model.weights none brings no statistics to keep; "
            "name weights, or take separate"
        )


def build_method(config: Config, num_classes: int) -> Method:
    """The method that the config names, with freshly initialised networks.

    Raises:
        UserError: an option does not fit the run, the classes or the network.
    """
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
    "check_durations",
    "check_frozen",
    "make_config",
]
