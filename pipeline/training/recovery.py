"""Where a run goes on: from the newest whole checkpoint that lies in its directory, whatever else is said of it there.

Ray Train keeps a record of its checkpoints beside them, and writes it in place: a kill or a full disk at that moment
leaves half of it, and without it Ray would begin at step 0. So the record is made anew from the checkpoints themselves
each time that a run is started again.
"""

from pipeline import checkpoint, storage
from pipeline.checkpoint import META_FILE, Meta
from pipeline.errors import UserError

RECORD_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's own name of it."""
UNSCORED = -1.0
"""What Ray is told of a checkpoint without an evaluation: never the best."""


def recover(out: str, resume_from: str | None = None) -> None:
    """Has Ray Train go on from the checkpoint that is first in `whole`, or from step 0 if there is none yet.

    Args:
        out: run directory.
        resume_from: see `whole`.

    Raises:
        UserError: see `whole`.
    """
    _write_record(out, whole(out, resume_from))


def whole(out: str, resume_from: str | None = None) -> list[str]:
    """Names of the checkpoints that a run may go on from, the newest first; the first one was read and is whole.

    Args:
        out: run directory.
        resume_from: name of the one to go on from; those after it are deleted. None: the newest that is whole; those
            after it are named.

    Raises:
        UserError: there are checkpoints, but none is whole; or the one that was named is not there or damaged.
    """
    names, later = checkpoint.written(out), list[str]()
    if resume_from is not None:
        at = _place(out, names, resume_from)
        names, later = names[at:], names[:at]
    damaged = []
    for name in names:
        problem = _damage(storage.join(out, name))
        if problem is None:
            break
        damaged.append(problem)
        if resume_from is None and len(damaged) < len(names):
            print(f"{problem}: the one before it is taken", flush=True)
    left = names[len(damaged) :]
    if not names and (halves := checkpoint.halves(out)):
        lack = f"{', '.join(halves)} {'lack' if len(halves) > 1 else 'lacks'} {META_FILE}"
        print(f"{out}: {lack}, so no checkpoint is whole: the run begins at step 0", flush=True)
    if damaged and resume_from is not None:
        raise UserError(f"{damaged[0]}; choose another one for --resume_from")
    if damaged and not left:
        raise UserError(f"{damaged[0]}; no whole checkpoint is before it: --fresh starts the run anew")
    for name in later:  # the run will come there again; not before the chosen one is known to be whole
        storage.delete(storage.join(out, name))
    return left


def _place(out: str, names: list[str], chosen: str) -> int:
    """Where in `names` the chosen one is."""
    if chosen not in names:
        there = f"it has {', '.join(names)}" if names else "it has none"
        raise UserError(f"--resume_from {chosen}: {out} has no such checkpoint; {there}")
    return names.index(chosen)


def _damage(uri: str) -> str | None:
    """Why a checkpoint cannot be resumed from; None: it is whole. Trouble of the storage is no damage: it is raised."""
    try:
        checkpoint.verify(uri)
    except UserError as error:
        if not _says_damage(error):
            raise
        return str(error)
    return None


def _says_damage(error: UserError) -> bool:
    """Whether it is about what a checkpoint holds: the storage's own errors, but for a missing file, are its cause."""
    return not isinstance(error.__cause__, OSError) or isinstance(error.__cause__, FileNotFoundError)


def _write_record(out: str, names: list[str]) -> None:
    """Replaces Ray's record by what the checkpoints say; one whose meta cannot be read is passed over."""
    uri = storage.join(out, RECORD_FILE)
    if not names:
        storage.delete(uri)
        return
    from pipeline.cluster.internals import checkpoint_record  # imports Ray

    metrics = {}
    for name in reversed(names):
        try:
            meta = checkpoint.read_meta(storage.join(out, name))
        except UserError as error:
            if not _says_damage(error):
                raise
            continue
        metrics[name] = {"step": meta.step, "score": _score(meta)}
    storage.write_bytes(uri, checkpoint_record(metrics).encode())


def _score(meta: Meta) -> float:
    return meta.last.value if meta.last is not None and meta.last.step == meta.step else UNSCORED
