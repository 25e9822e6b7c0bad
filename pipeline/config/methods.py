"""The systems of the comparison, and what is known of each without its networks: this module imports no torch.

Drivers, sweeps and flags ask here. The code of a method is imported where it trains. A package that brings methods of
its own names a `MethodSpec` for each under the entry point `u2pl.methods`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points

from pipeline.config import options as own
from pipeline.config.options_fixmatch import FixMatchOptions, UniMatchOptions, UniMatchV2Options
from pipeline.config.schema import Config
from pipeline.errors import UserError

ENTRY_POINT = "u2pl.methods"
"""Group under which other packages name their methods."""


@dataclass(frozen=True)
class ViewSpec:
    """Which views of the images a method needs."""

    unlabeled: bool
    """Whether it uses unlabeled images."""
    strong: int = 0
    """How many strong views of each unlabeled image it needs."""
    pseudo: bool = False
    """Whether it needs pseudo-labels that were made beforehand."""


@dataclass(frozen=True)
class MethodSpec:
    """One system of the comparison, as it is known before it is built."""

    code: str
    """Module and class of the method, `module:Class`."""
    options: Mapping[str, type]
    """Sections of the config that it reads: its own, and those of the methods that it builds on."""
    views: ViewSpec = field(default_factory=lambda: ViewSpec(unlabeled=True))
    """Which views of the images it needs."""
    durations: tuple[str, ...] = ()
    """Keys of options, such as `u2pl.warmup`, that are steps or, below 1, a share of the run; must end before it."""


_LABELED = ViewSpec(unlabeled=False)
_STRONG = ViewSpec(unlabeled=True, strong=1)
_TWO_STRONG = ViewSpec(unlabeled=True, strong=2)
_AEL = {"ael": own.AELOptions}
_U2PL = {"u2pl": own.U2PLOptions}
_CODE = "pipeline.methods"

SPECS: dict[str, MethodSpec] = {
    "suponly": MethodSpec(f"{_CODE}.suponly:SupOnly", {"suponly": own.SupOnlyOptions}, _LABELED),
    "self_training": MethodSpec(
        f"{_CODE}.self_training:SelfTraining",
        {"self_training": own.SelfTrainingOptions},
        ViewSpec(unlabeled=True, strong=1, pseudo=True),
    ),
    "mean_teacher": MethodSpec(
        f"{_CODE}.mean_teacher:MeanTeacher",
        {"mean_teacher": own.MeanTeacherOptions},
        durations=("mean_teacher.ramp",),
    ),
    "cutmix_seg": MethodSpec(f"{_CODE}.cutmix_seg:CutMixSeg", {"cutmix_seg": own.CutMixSegOptions}, _STRONG),
    "cct": MethodSpec(f"{_CODE}.cct:CCT", {"cct": own.CCTOptions}, durations=("cct.ramp",)),
    "gct": MethodSpec(f"{_CODE}.gct:GCT", {"gct": own.GCTOptions}, durations=("gct.ramp",)),
    "cps": MethodSpec(f"{_CODE}.cps:CPS", {"cps": own.CPSOptions}),
    "pseudoseg": MethodSpec(f"{_CODE}.pseudoseg:PseudoSeg", {"pseudoseg": own.PseudoSegOptions}, _STRONG),
    "pc2seg": MethodSpec(f"{_CODE}.pc2seg:PC2Seg", {"pc2seg": own.PC2SegOptions}, _STRONG),
    "ael": MethodSpec(f"{_CODE}.ael.ael:AEL", _AEL, durations=("ael.warmup",)),
    "u2pl": MethodSpec(f"{_CODE}.u2pl.u2pl:U2PL", _U2PL, durations=("u2pl.warmup",)),
    "u2pl_ael": MethodSpec(
        f"{_CODE}.u2pl.with_ael:U2PLAEL",
        {"u2pl_ael": own.U2PLAELOptions, **_AEL, **_U2PL},
        durations=("ael.warmup", "u2pl_ael.contrast_start"),
    ),
    "fixmatch": MethodSpec(f"{_CODE}.fixmatch:FixMatch", {"fixmatch": FixMatchOptions}, _STRONG),
    "unimatch": MethodSpec(f"{_CODE}.unimatch:UniMatch", {"unimatch": UniMatchOptions}, _TWO_STRONG),
    "unimatch_v2": MethodSpec(f"{_CODE}.unimatch_v2:UniMatchV2", {"unimatch_v2": UniMatchV2Options}, _TWO_STRONG),
}
"""In the order of the paper's tables; after U2PL what came later, and the methods of other packages."""


def _join_others() -> None:
    """Adds the methods of other packages that are installed.

    Raises:
        UserError: names a package of which a method cannot be had.
    """
    for point in sorted(entry_points(group=ENTRY_POINT), key=lambda each: each.name):
        package = point.dist.name if point.dist else point.value
        try:
            spec = point.load()
        except Exception as error:
            raise UserError(f"method {point.name} of the package {package}: {error}; mend or uninstall it") from error
        if not isinstance(spec, MethodSpec):
            raise UserError(f"method {point.name} of the package {package}: {point.value} is no MethodSpec")
        if point.name in SPECS:
            raise UserError(f"method {point.name} of the package {package}: there is one of this name; rename it")
        SPECS[point.name] = spec


_join_others()
OPTIONS: dict[str, dict[str, type]] = {name: dict(spec.options) for name, spec in SPECS.items()}
"""By method the sections that it reads."""


def steps_of(duration: float, total: int) -> int:
    """A duration in steps: from 1 on it is a number of steps, below 1 a share of the run's `total` steps."""
    return round(duration * total) if duration < 1 else round(duration)


def check_durations(config: Config) -> None:
    """Refuses a warm-up, ramp or start that the run does not outlast: the method would silently be another one.

    Raises:
        UserError: names the option.
    """
    total, values = config.optim.steps, {"optim.warmup": config.optim.warmup}
    for key in SPECS[config.method].durations:
        section, _, name = key.partition(".")
        values[key] = getattr(config.options[section], name)
    for key, value in values.items():
        if steps_of(value, total) >= total:
            raise UserError(
                f"{key} {value:g}: the run ends after {total} steps (optim.steps); give fewer steps, or a share of the "
                "run such as 0.3"
            )


def check_classes(config: Config, classes: int) -> None:
    """Refuses what does not go with a dataset's number of classes.

    Raises:
        UserError: names the option.
    """
    background, weights = config.data.background, config.loss.class_weights
    if background.isdigit() and int(background) >= classes:
        raise UserError(f"data.background {background}: there are classes 0 to {classes - 1}")
    if weights and len(weights) != classes:
        raise UserError(f"loss.class_weights: {len(weights)} numbers for {classes} classes; give one for each")


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
