"""A search for good options of one method, on Ray Tune: random or Optuna's choice, with or without early stops.

Never for a protocol table: there every method gets the same steps and options that were chosen beforehand.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.cluster.connect import connect
from pipeline.config.schema import Config, as_dict
from pipeline.errors import UserError
from pipeline.sweep.run import sized
from pipeline.sweep.table import TrialRow
from pipeline.sweep.trials import Trial, check_trial, make_trial
from pipeline.training.preflight import resolve_paths, warn_of_local_places

DEFAULT_OUT = "runs/search"
DIGITS = 4
"""Significant digits of a drawn number."""
PLACES = ("data.root", "model.weights")
"""Options that hold a path."""
REDUCTION = 3
"""ASHA goes on with the best third of what has come to each of its rungs."""


@dataclass(frozen=True)
class Range:
    """Numbers between two ends: evenly by logarithm if they are a factor of ten apart, else evenly."""

    low: float
    high: float

    @property
    def logarithmic(self) -> bool:
        """Whether orders of magnitude count."""
        return self.low > 0 and self.high / self.low >= 10

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def text(self, value: float) -> str:
        """A drawn number as text, rounded to `DIGITS` and never past an end of the range."""
        return str(value) if self.whole else f"{min(max(float(f'{value:.{DIGITS}g}'), self.low), self.high):g}"


Space = Mapping[str, Range | tuple[str, ...]]
"""What to draw from, by dotted key."""


def parse_space(texts: Sequence[str]) -> dict[str, Range | tuple[str, ...]]:
    """Reads `section.key=low..high` and `section.key=a,b,c`.

    Raises:
        UserError: neither, or a key twice.
    """
    space: dict[str, Range | tuple[str, ...]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        choices = tuple(filter(None, values.split(",")))
        found = _range(values) if ".." in values else choices
        if not key or not found or key in space:
            raise UserError(f"--space {text}: expected section.key=low..high or section.key=a,b,c, each key once")
        space[key] = found
    if not space:
        raise UserError("--space: name what to draw, such as optim.lr=0.001..0.1 u2pl.lambda_c=0.05,0.1,0.2")
    return space


def _range(text: str) -> Range | None:
    low, _, high = text.partition("..")
    for number in (int, float):
        try:
            found = Range(number(low), number(high))
        except ValueError:
            continue
        return found if found.low < found.high and math.isfinite(found.high) else None
    return None


def sample(base: Config, space: Space, drawn: Mapping[str, Any], place: int) -> Trial:
    """The run of drawn values, a directory below that of the search; `problem` says if they do not go together.

    The same search draws the same values in the same order (Optuna: if one sample runs at a time) and so goes on.

    Args:
        base: with absolute paths; its `out` is the search's directory.
        space: that the values were drawn from.
        drawn: values by dotted key.
        place: in the order of the samples.
    """
    chosen = {}
    for key, value in drawn.items():
        values = space[key]
        chosen[key] = values.text(value) if isinstance(values, Range) else str(value)
    name = "-".join([f"{place:03d}", *(f"{key}-{value}" for key, value in chosen.items())])
    try:
        return make_trial(as_dict(base), name, chosen)
    except UserError as error:
        return replace(make_trial(as_dict(base), name, {}), problem=str(error))


def prepare(base: Config, space: Space) -> tuple[Config, Space]:
    """The config that all samples have in common, and the space with numbers of its options' types.

    Raises:
        UserError: an unknown key, an end that is no value of it, or what `preflight.resolve` raises of either end.
    """
    base = resolve_paths(replace(base, out=base.out or DEFAULT_OUT))
    space = {
        key: _typed(each, _value(base, key)) if isinstance(each, Range) else _absolute(base, key, each)
        for key, each in space.items()
    }
    for end in (0, -1):
        ends = {
            key: (each.low, each.high)[end] if isinstance(each, Range) else each[end] for key, each in space.items()
        }
        trial = sample(base, space, ends, 0)
        if trial.problem:
            raise UserError(trial.problem)
        check_trial(trial)
    return base, space


def _value(config: Config, key: str) -> Any:
    """What the config has at a dotted key, if anything."""
    section, _, field = key.rpartition(".")
    return as_dict(config).get(section, {}).get(field)


def _absolute(config: Config, key: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Places do not depend on the directory that a sample runs in."""
    if key not in PLACES:
        return choices
    return tuple(str(_value(make_trial(as_dict(config), "", {key: choice}).config, key)) for choice in choices)


def _typed(ends: Range, value: Any) -> Range:
    """A range of the option's type: 0..1 of a fraction is no choice between 0 and 1."""
    return Range(float(ends.low), float(ends.high)) if isinstance(value, float) else ends


def search(base: Config, space: Space, samples: int, *, optuna: bool, asha: bool, at_once: int = 0) -> list[TrialRow]:
    """Runs the samples and shows how far they are and why any failed; what an earlier search has finished is taken.

    Args:
        base: from `prepare`.
        space: what to draw.
        samples: how many.
        optuna: draw where earlier samples did well instead of at random.
        asha: stop samples that are not among the best third of those that came to the same evaluation.
        at_once: how many at a time; 0: as many as the nodes hold that are up.

    Returns:
        The samples that have at least one evaluation: those that came to their end, then the others, best last one
        first.

    Raises:
        UserError: a sample does not fit the cluster, or Optuna is not installed.
    """
    connect()
    from ray import tune

    # imports Ray, which must not happen before `connect`
    from pipeline.sweep.tune import LiveTable, run_tuner

    (sized_trial,), at_once = sized([Trial("search", base)], at_once)
    warn_of_local_places(base)
    base = sized_trial.config

    def find(params: Mapping[str, Any], place: int) -> Trial:
        return sample(base, space, params, place)

    config = tune.TuneConfig(
        metric="score",
        mode="max",
        num_samples=samples,
        search_alg=_optuna(base.seed, at_once) if optuna else _random(base.seed, at_once),
        scheduler=early_stops(base) if asha else None,
    )
    with LiveTable([], find, samples) as live:
        run_tuner(find, {key: _domain(each) for key, each in space.items()}, config, live)
    for name, why in live.failed().items():
        print(f"{name} failed: {why}")
    scored = [row for row in live.rows.values() if row.miou is not None]
    return sorted(scored, key=lambda row: (row.state != "done", -(row.miou or 0.0)))


def _domain(values: Range | tuple[str, ...]) -> Any:
    from ray import tune

    if not isinstance(values, Range):
        return tune.choice(list(values))
    if values.whole:
        draw: Callable[..., Any] = tune.lograndint if values.logarithmic else tune.randint
        return draw(int(values.low), int(values.high) + 1)
    return (tune.loguniform if values.logarithmic else tune.uniform)(values.low, values.high)


def _random(seed: int, at_once: int) -> Any:
    from ray.tune.search.basic_variant import BasicVariantGenerator

    return BasicVariantGenerator(random_state=seed, max_concurrent=at_once)


def _optuna(seed: int, at_once: int) -> Any:
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    try:
        return ConcurrencyLimiter(OptunaSearch(seed=seed), max_concurrent=at_once)
    except (ImportError, AssertionError) as error:
        raise UserError("--optuna: not installed; pip install 'u2pl-ray[search]'") from error


def early_stops(config: Config) -> Any:
    """ASHA over evaluations: at the first one and at 3, 9, ... times its step the best third of those so far goes on.

    Rungs are steps, so trials that began at other times, or run beside each other, are compared where they had equally
    much training. A verdict depends on what came to the rung before; the trial that is best at every rung always goes
    on.
    """
    from ray.tune.schedulers import ASHAScheduler

    steps, every = config.optim.steps, config.eval.every
    # one step more than there are: what has come to its end shall end by itself
    return ASHAScheduler(time_attr="step", max_t=steps + 1, grace_period=min(steps, every), reduction_factor=REDUCTION)
