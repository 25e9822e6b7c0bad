"""What a sweep will take, from measured steps: printed before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.methods import METHODS
from pipeline.sweep.follow import Row, look, table
from pipeline.sweep.trials import Trial


@dataclass(frozen=True)
class Node:
    """A kind of machine."""

    workers: int
    """Train workers that it holds."""
    price: float
    """Money per hour; 0: not asked for."""
    count: int
    """How many there are."""


def parse_node(texts: Sequence[str]) -> Node:
    """Reads count, workers and price.

    Raises:
        UserError: no such numbers.
    """
    try:
        node = Node(count=int(texts[0]), workers=int(texts[1]), price=float(texts[2]))
    except ValueError:
        raise UserError(f"--node {' '.join(texts)}: expected COUNT WORKERS PRICE, such as 2 8 32.77") from None
    if node.count < 1 or node.workers < 1 or node.price < 0:
        raise UserError(f"--node {' '.join(texts)}: count and workers must be at least 1")
    return node


def parse_step_seconds(texts: Sequence[str]) -> dict[str, float]:
    """Reads `METHOD=SECONDS`, or `SECONDS` for all others (key `""`).

    Raises:
        UserError: neither.
    """
    found = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise UserError(f"--step_seconds {text}: expected METHOD=SECONDS, or SECONDS for all methods") from None
        if found[name] <= 0:
            raise UserError(f"--step_seconds {text}: must be above 0")
    return found


def plan(trials: Sequence[Trial], step_seconds: Mapping[str, float], node: Node) -> list[str]:
    """The trials with their steps and hours, as lines. Evaluations and the start of a trial come on top.

    The time of a step is the given one, or that of the sweep's own records of the method: the same number of workers is
    taken for granted.

    Raises:
        UserError: a method whose steps nobody has timed.
    """
    measured = _measured(trials)
    rows, hours = [("trial", "steps left", "s/step", "hours")], 0.0
    for trial in trials:
        method = trial.config.method
        seconds = step_seconds.get(method, measured.get(method, step_seconds.get("", 0.0)))
        if not seconds:
            raise UserError(f"no step of {method} was timed: run one trial, or pass --step_seconds {method}=SECONDS")
        left = 0 if trial.finished() else trial.config.optim.steps - trial.steps()
        rows.append((trial.name, str(left), f"{seconds:.3g}", f"{left * seconds / 3600:.2f}"))
        hours += left * seconds / 3600 * max(1, trial.config.run.workers)
    nodes = hours / node.workers
    money = f", {nodes * node.price:.2f} at {node.price:g} an hour" if node.price else ""
    whole = f"{len(trials)} trials, {hours:.1f} worker hours: {nodes:.1f} node hours of {node.workers} workers{money}"
    return [*table(rows), whole, f"about {nodes / node.count:.1f} hours on {node.count} nodes if trials fill them"]


def images_per_step(config: Config) -> int:
    """Labeled and unlabeled images that all workers read in a step."""
    unlabeled = config.optim.batch_unlabeled if METHODS[config.method].views.unlabeled else 0
    return config.optim.batch_labeled + unlabeled


def _measured(trials: Sequence[Trial]) -> dict[str, float]:
    """Seconds per step by method, of the newest record of a trial that has begun."""
    found = {}
    for trial in trials:
        row = Row(trial)
        look(row)
        if row.images_per_second:
            found[trial.config.method] = images_per_step(trial.config) / row.images_per_second
    return found
