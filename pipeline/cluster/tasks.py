"""Independent tasks on Ray Data, many at a time, for jobs that go through a dataset."""

import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from tqdm import tqdm

from pipeline.cluster import nodes
from pipeline.cluster.connect import connect, quiet_data
from pipeline.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
WAVE = 1000
"""Tasks per Ray Data execution, whose start-up time and memory grow with their number."""


def run(
    task: Callable[[T], R],
    items: Iterable[T],
    total: int,
    doing: str,
    workers: int | None = None,
    *,
    on_gpus: bool = False,
) -> Iterator[R]:
    """Results of `task` for each item, in order; both are sent by pickle.

    Args:
        task: a function at the top of a module; may raise `UserError`.
        items: may be made lazily.
        total: how many there are.
        doing: what is shown of the progress: `prepare: %d of %d shards`.
        workers: tasks at a time; None: as many as the cluster has CPUs for.
        on_gpus: give each task a GPU, if the cluster has any.

    Raises:
        UserError: the first one that a task raised.
    """
    connect()
    quiet_data()
    gpus = int(on_gpus and any(machine.gpus for machine in nodes.machines()))
    return _progress(_results(task, iter(items), workers, gpus), total, doing)


def _results(task: Callable[[T], R], items: Iterator[T], workers: int | None, gpus: int) -> Iterator[R]:
    import ray.data

    while wave := [{"call": pickle.dumps((task, item))} for item in islice(items, WAVE)]:
        results = ray.data.from_items(wave, override_num_blocks=len(wave)).map(
            _call, concurrency=workers, num_cpus=1, num_gpus=gpus
        )
        for row in results.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield pickle.loads(row["result"])


def _call(row: dict[str, Any]) -> dict[str, Any]:
    """Runs in a Ray worker. A `UserError` is returned as text, because Ray would wrap it in a traceback."""
    task, item = pickle.loads(row["call"])
    try:
        return {"result": pickle.dumps(task(item)), "error": ""}
    except UserError as error:
        return {"result": b"", "error": str(error)}


def _progress(results: Iterable[R], total: int, doing: str) -> Iterator[R]:
    """Shows how many are done: a bar on a terminal, elsewhere a line for every tenth."""
    if sys.stderr.isatty():
        yield from tqdm(results, total=total, desc=doing.partition(":")[0], unit=doing.rpartition(" ")[2])
        return
    step = max(1, total // 10)
    for number, result in enumerate(results, start=1):
        yield result
        if number % step == 0 or number == total:
            print(doing % (number, total), flush=True)
