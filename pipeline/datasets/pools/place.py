"""The place of a pool while prepare is at work: what was begun there, what is prepare's own, what is of others."""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pipeline import storage
from pipeline.datasets.files import escaped, is_junk
from pipeline.datasets.pools.pool import POOL_FILE, WORK_FOLDER, Pool, folder_name, open_pool
from pipeline.datasets.prepared.dataset import INFO_FILE
from pipeline.errors import UserError
from pipeline.records import read_record

PLAN_FILE = f"{WORK_FOLDER}/plan.json"
_WRITTEN = re.compile(
    r"(work/((plan|listed)\.json|(files|scan)-\d{7,}\.arrow)|gen-\d{5,}/(part-\d{7,}|keys/\d{4,})\.parquet)"
    r"(\.[0-9a-f]{8}\.tmp)?"
)
"""Paths below the pool that prepare deletes: what it writes, also half-way."""


@dataclass(frozen=True)
class PoolPlan:
    """What one call of prepare is about; the same call, started again, goes on."""

    root: str
    """The pool."""
    source: str
    """A key of `POOL_SOURCES`."""
    images: str
    """Where the files are."""
    kind: Literal["bytes", "links"]
    """Whether it will hold the images."""
    generation: int
    """Number of the folder that is made."""
    replaces: int
    """Number of the first folder that goes when all is done; `generation` if none does."""
    column: str
    """Of the images in Parquet; empty: as found."""

    def of_the_same(self, other: "PoolPlan") -> bool:
        """Whether both ask for the same pool, in whatever folder."""
        return replace(self, generation=0, replaces=0) == replace(other, generation=0, replaces=0)

    @property
    def anew(self) -> str:
        """What to do, for people, if nothing of what is there can be used."""
        begun = storage.join(self.root, folder_name(self.generation))
        return f"delete {begun} and {storage.join(self.root, WORK_FOLDER)} and begin again"

    def work(self, name: str) -> str:
        """URI of a file that is needed only meanwhile."""
        return storage.join(self.root, WORK_FOLDER, name)

    def keys(self, run: int, generation: int | None = None) -> str:
        """URI of a run's keys."""
        number = self.generation if generation is None else generation
        return storage.join(self.root, folder_name(number), "keys", f"{run:04d}.parquet")


def claim(root: str, append: bool, overwrite: bool) -> Pool | None:
    """The pool that is there; refuses a place with files of others."""
    if append and overwrite:
        raise UserError("--append and --overwrite exclude each other")
    if storage.exists(storage.join(root, INFO_FILE)):
        raise UserError(f"{root}: holds a dataset; choose another place for the pool")
    if append or storage.exists(storage.join(root, POOL_FILE)):
        return open_pool(root)
    if left_plan(root) is None:
        foreign = next((file for file in files_below(root) if not is_junk(file) and not _is_half_plan(file)), None)
        if foreign is not None:
            raise UserError(
                f"{root}: holds files that prepare did not write, such as {escaped(foreign)}; choose an empty --out"
            )
    return None


def files_below(folder: str) -> Iterator[str]:
    """Paths of what is below a folder, if there is one."""
    try:
        yield from (file for file, _ in storage.iter_files(folder))
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise


def is_written(path: str) -> bool:
    """Whether prepare gives this name to what it writes below the pool."""
    return _WRITTEN.fullmatch(path) is not None


def _is_half_plan(path: str) -> bool:
    """The plan is what prepare writes first; a call that dies then leaves this on a disk."""
    return is_written(path) and path.startswith(f"{PLAN_FILE}.")


def left_plan(root: str) -> PoolPlan | None:
    """The plan of a call that did not come to its end at `root`.

    Raises:
        UserError: a file of this name is there that prepare did not write.
    """
    uri = storage.join(root, PLAN_FILE)
    if not storage.exists(uri):
        return None
    try:
        return replace(read_record(PoolPlan, storage.read_bytes(uri)), root=root)
    except ValueError as error:
        raise UserError(f"{uri}: prepare of this version did not write it; choose another place") from error


def check_same(pool: Pool, plan: PoolPlan) -> None:
    """Refuses to add to a pool what it was not made of."""
    info = pool.info
    if (plan.source, plan.images, plan.kind, plan.column) != (info.source, info.root, info.kind, info.column):
        made = f"--source {info.source} --root {info.root}" + " --copy" * info.copied
        made += f" --column {info.column}" * bool(info.column)
        raise UserError(f"{plan.root}: was made with {made}; append the same, or make another pool and name both")


def clear(plan: PoolPlan, folders: Container[int], *, keep_plan: bool = False) -> None:
    """Deletes what a plan wrote or replaces, but for the generations of the pool; files of others stay.

    The plan itself goes last: it says that the rest is prepare's.
    """
    gone = [folder_name(n) for n in range(plan.replaces, plan.generation + 1) if n not in folders]
    for folder in (*gone, WORK_FOLDER):
        for file in [f"{folder}/{file}" for file in files_below(storage.join(plan.root, folder))]:
            if is_written(file) and file != PLAN_FILE:
                storage.delete(storage.join(plan.root, file))
        storage.delete_empty(storage.join(plan.root, folder, "keys"))
        storage.delete_empty(storage.join(plan.root, folder))
    if not keep_plan:
        storage.delete(storage.join(plan.root, PLAN_FILE))
        storage.delete_empty(plan.work(""))
