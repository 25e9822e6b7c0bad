"""What a sweep will take, from measured steps: printed before anything starts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.methods import SPECS
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.sweep.table import TrialRow, look, table
from pipeline.sweep.trials import Trial
from pipeline.training.scaling import allowed_counts


@dataclass(frozen=True)
class Node:
    """A node type and its price."""

    workers: int
    """Train workers per node."""
    price: float
    """Money per hour; 0: not asked for."""
    count: int
    """Number of nodes."""


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
    """The trials with their steps, evaluations and hours, as lines. The start of a trial comes on top.

    The time of a step is the given one, with the workers that `scaling.workers` asks for, or that of the sweep's own
    records of the same method, network, crop and batch, with the workers of that record. Evaluations count as far as
    one of those is on record.

    Raises:
        UserError: a method whose steps nobody has timed, or a trial that needs more workers than all nodes hold.
    """
    measured = _measured(trials)
    rows, hours, missing = [("trial", "workers", "steps left", "s/step", "evaluations", "hours")], 0.0, set[str]()
    for trial in trials:
        method = trial.config.method
        row = measured.get(_work(trial), TrialRow(trial))
        known = images_per_step(trial.config) / row.images_per_second if row.images_per_second else 0.0
        given = step_seconds.get(method, step_seconds.get("", 0.0))
        seconds = given or known
        if not seconds:
            raise UserError(f"no step of {method} was timed: run one trial, or pass --step_seconds {method}=SECONDS")
        workers = (row.workers if known and not given else 0) or workers_asked(trial.config, node)
        left = _steps_left(trial)
        scored = math.ceil(left / trial.config.eval.every)
        took = left * seconds + scored * row.eval_seconds / workers
        rows.append((trial.name, str(workers), str(left), f"{seconds:.3g}", str(scored), f"{took / 3600:.2f}"))
        hours += took / 3600 * workers
        missing |= ({"evaluations"} if scored and not row.eval_seconds else set()) | (
            {"labelling"} if trial.staged else set()
        )
    nodes = hours / node.workers
    money = f", {nodes * node.price:.2f} at {node.price:g} an hour" if node.price else ""
    whole = f"{len(trials)} trials, {hours:.1f} worker hours: {nodes:.1f} node hours of {node.workers} workers{money}"
    if missing:
        whole += f"; {' and '.join(sorted(missing))} that nobody has timed come on top"
    return [*table(rows), whole, f"about {nodes / node.count:.1f} hours on {node.count} nodes if trials fill them"]


def workers_asked(config: Config, node: Node) -> int:
    """Workers of a run: the most that it asks for, the batch allows and all nodes hold.

    Raises:
        UserError: not even the fewest fit.
    """
    held = node.count * node.workers
    fewest, most = (1, held) if config.scaling.workers == "auto" else config.scaling.limits()
    able = [n for n in allowed_counts(config) if fewest <= n <= min(most, held)]
    if not able:
        wanted = f"scaling.workers {config.scaling.workers} that share the batch"
        raise UserError(f"--node: {node.count} nodes of {node.workers} hold no {wanted}")
    return max(able)


def _steps_left(trial: Trial) -> int:
    """Steps that a trial still has to do. A recipe's teacher is counted like its student."""
    whole = trial.config.optim.steps
    if trial.finished():
        return 0
    student = whole - trial.steps()
    return student + whole if trial.staged and student == whole else student


def images_per_step(config: Config) -> int:
    """Labeled and unlabeled images that all workers read in a step."""
    unlabeled = config.optim.batch_unlabeled if SPECS[config.method].views.unlabeled else 0
    return config.optim.batch_labeled + unlabeled


def _measured(trials: Sequence[Trial]) -> dict[tuple[Any, ...], TrialRow]:
    """The measured time of steps and evaluations, by kind of work, from trials that have begun."""
    found = {}
    for trial in trials:
        row = TrialRow(trial)
        look(row)
        if row.images_per_second and row.eval_seconds >= found.get(_work(trial), row).eval_seconds:
            found[_work(trial)] = row
    return found


def _work(trial: Trial) -> tuple[Any, ...]:
    """What the time of a step depends on, beside the machine."""
    config = trial.config
    return config.method, config.model, config.data.crop, config.optim.batch_labeled, config.optim.batch_unlabeled
