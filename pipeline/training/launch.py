"""From a config to a finished run on Ray Train: checks first, then workers, then the result."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline import checkpoint, storage
from pipeline.checkpoint import (
    CONFIG_FILE,
    LOG_FILE,
    METRICS_FILE,
    PICTURES,
    SUMMARY_FILE,
    TRACKING_FILE,
    Progress,
    read_summary,
)
from pipeline.cluster import nodes
from pipeline.cluster.connect import connect
from pipeline.cluster.failures import explained, traceback_of
from pipeline.cluster.nodes import Workers
from pipeline.cluster.terminal import say
from pipeline.config.methods import SPECS
from pipeline.config.schema import Config, as_dict, to_yaml
from pipeline.datasets.prepared.dataset import Dataset
from pipeline.errors import Diverged, RunError, UserError
from pipeline.inference.class_table import class_table, counted
from pipeline.ingest.order import share_lanes
from pipeline.ingest.read import share
from pipeline.patience import Patience
from pipeline.training.lease import check_free, held
from pipeline.training.preflight import Checked, check_identity, resolve, resolve_paths, warn_of_local_places
from pipeline.training.recovery import RECORD_FILE, recover, whole
from pipeline.training.scaling import worker_counts, workers_of
from pipeline.training.trackers import PAGE, delete_steps

RUN_FILES = {
    CONFIG_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    LOG_FILE,
    TRACKING_FILE,
    "tensorboard",
    "wandb",
    RECORD_FILE,
    ".validate_storage_marker",
}
"""Names that a run writes beside its checkpoints, but for its pictures, as a folder of that name may be the user's, and
the lease, which is held while they are deleted."""
NAME_LENGTH = 255
"""Of a name at most by which Ray knows a run: it calls a folder on each node so, and a placement group, in ASCII."""


def launch(
    config: Config,
    *,
    fresh: bool = False,
    resume_from: str | None = None,
    callbacks: Sequence[Any] = (),
    grace: float = 0.0,
) -> Progress:
    """Runs a config on the cluster and prints the result; a run that was cut off goes on where it was.

    Args:
        config: checked config; for `data.root` generated the shapes dataset is made first.
        fresh: delete what is in the run directory and start anew.
        resume_from: name of the checkpoint to go on from, which may be of a finished run; None: the newest whole one.
        callbacks: `ray.train.UserCallback`s that are told of checkpoints.
        grace: seconds in which another job that trains the run may still end.

    Raises:
        UserError: something in the config, the data or the run directory cannot be used, or another job trains the
            run; found before any worker starts as far as possible.
    """
    checked = resolve(resolve_paths(config), fresh=fresh)
    config = checked.config
    with held(str(config.out), Patience(config.run.storage_patience), grace) as holder:
        progress = _launch(checked, holder, fresh, resume_from, callbacks)
    _print_result(config, checked.dataset, progress)
    return progress


def plan(config: Config) -> None:
    """Checks what a start checks and prints what would run; starts no worker and no node, and touches no run.

    Raises:
        UserError: the run cannot be started.
    """
    checked = resolve(resolve_paths(config))
    config, out = checked.config, str(checked.config.out)
    check_identity(config)
    other = check_free(out)
    connect()
    # of a cluster that starts nodes, only those would show what fits
    counts = worker_counts(config) if nodes.grows() else workers_of(config).counts
    _announce(checked, counts)
    say(_memory(checked, counts[0]))
    warn_of_local_places(config)
    if other:
        say(f"{other} was here and did not say that it has ended: a start would listen first whether it lives")
    if storage.exists(storage.join(out, SUMMARY_FILE)):
        say("it is finished")
    else:
        names = whole(out)
        say(f"it would start from {storage.join(out, names[0]) if names else 'step 0'}; nothing was started")


def _memory(checked: Checked, workers: int) -> str:
    """What a step needs on each of so many workers; beside it what a GPU of this machine has, if there is one."""
    import torch

    from pipeline.training.memory import estimate, gpu_memory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return estimate(checked.config, len(checked.dataset.info.classes), workers, gpu_memory(device))


def _launch(checked: Checked, holder: str, fresh: bool, resume_from: str | None, callbacks: Sequence[Any]) -> Progress:
    """Trains what is not trained yet; returns the result."""
    config = checked.config
    done = storage.join(str(config.out), SUMMARY_FILE)
    if not fresh:
        check_identity(config)
        if resume_from is None and storage.exists(done):
            say(f"{config.out} is finished; --fresh trains it anew, another --out a longer or other run")
            return read_summary(done)
    connect()
    workers = workers_of(config)  # a start that is refused here has not touched the run
    begin_run(config, fresh)
    retried = Patience(config.run.storage_patience).retried
    retried(lambda: recover(str(config.out), resume_from))
    storage.delete(done)  # there only if an earlier checkpoint was chosen
    _announce(checked, workers.counts)
    warn_of_local_places(config)
    say(f"starting {_counted(workers.counts)}")
    progress = Progress.from_dict(_fit(checked, workers, holder, callbacks))
    summary = json.dumps(asdict(progress), indent=1).encode()
    retried(lambda: storage.write_bytes(done, summary))
    return progress


def begin_run(config: Config, fresh: bool) -> None:
    """Checks that the run directory is free or this run's own, and writes the config."""
    assert config.out is not None
    uri = storage.join(config.out, CONFIG_FILE)
    if fresh:
        delete_run(config.out)
    storage.check_writable(config.out)
    check_identity(config)
    storage.write_bytes(uri, to_yaml(config).encode())


def delete_run(out: str) -> None:
    """Deletes what a run has written into its directory, and nothing else."""
    for name in {file.split("/")[0] for file in storage.list_files(out)}:
        if name in RUN_FILES or checkpoint.is_name(name):
            storage.delete(storage.join(out, name))
    pictures = storage.join(out, PICTURES)
    delete_steps(pictures, PAGE)
    storage.delete_empty(pictures)


def _counted(counts: Sequence[int]) -> str:
    """Numbers of workers, in words."""
    return f"{' or '.join(map(str, counts))} worker{'s' * (tuple(counts) != (1,))}"


def _announce(checked: Checked, counts: Sequence[int]) -> None:
    config, dataset, split, sources = checked
    optim = config.optim
    unlabeled = f" + {optim.batch_unlabeled} unlabeled" if SPECS[config.method].views.unlabeled else ""
    say(
        f"{config.method} on {dataset.info.name}, split {split.name}: {len(split.labeled)} labeled, "
        f"{len(split.unlabeled)} unlabeled images, list {split.digest}\n"
        f"{_counted(counts)}, global batch {optim.batch_labeled} labeled{unlabeled}, "
        f"lr {optim.lr:g} "
        f"(head x{optim.head_lr_mult:g}; not scaled by workers: the batch is global), {optim.steps} steps\n"
        f"results in {config.out}"
    )
    if not dataset.located:
        say(
            f"{dataset.root}: of an earlier version, whose index does not say where images lie: whole row groups are "
            "read, and all labeled images held in memory; prepare it again to read less"
        )
    unseen = dataset.info.unseen("val")
    if unseen:
        classes = len(dataset.info.classes)
        say(
            f"the validation set shows none of {', '.join(unseen)}: where the network names none either, mIoU is over "
            f"{classes - len(unseen)} of {classes} classes"
        )
    if config.data.unlabeled_pools:
        for source, lanes in zip(sources, share_lanes(sources, optim.batch_unlabeled) if sources else (), strict=True):
            pinned = f", generations 1 to {source.generations}" if source.generations else ""
            say(f"unlabeled: {lanes} of {optim.batch_unlabeled} from {source.name} ({source.images} images{pinned})")


def _fit(checked: Checked, workers: Workers, holder: str, callbacks: Sequence[Any]) -> dict[str, Any]:
    """Runs the workers under Ray Train; returns rank 0's progress.

    Labeled images that are to be held are read before: workers that start anew find them in the object store.
    """
    import ray.train
    from ray.exceptions import RayError

    # these import Ray, which must not happen before `connect`
    from pipeline.cluster.console import LostWorkers, relayed
    from pipeline.cluster.elastic import ElasticTrainer

    config, dataset, split, _ = checked
    assert config.out is not None
    filesystem, path = storage.resolve(config.out)
    parent, _, name = path.rpartition("/")
    if not name.isascii() or len(name) > NAME_LENGTH:  # then it knows the place alone
        parent, name = path, "."
    with relayed(config.optim.steps) as console:
        run_config = ray.train.RunConfig(
            name=name,
            storage_path=parent,
            storage_filesystem=filesystem,
            callbacks=[LostWorkers(console.line), *callbacks],
            # nodes that were taken away with notice are not counted
            failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures, max_preemption_failures=-1),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="score", checkpoint_score_order="max"
            ),
        )
        values = {"config": as_dict(config), "holder": holder, "line": console.line}
        try:
            values["labeled"] = share(dataset, split.labeled, Patience(config.run.storage_patience))
            trainer = ElasticTrainer(_work, train_loop_config=values, workers=workers, run_config=run_config)
            result: dict[str, Any] = trainer.fit().return_value  # type: ignore[assignment]
        except (ray.train.TrainingFailedError, RayError, KeyboardInterrupt) as error:
            if console.signal is not None or isinstance(error, KeyboardInterrupt):
                raise console.stopped() from error
            raise _failed(error, config) from error
    if "user_error" in result:
        raise UserError(result["user_error"])
    if "diverged" in result:
        raise Diverged(f"{result['diverged']}; the last checkpoint before it is in {config.out}")
    if "stopped" in result:
        raise console.stopped(result["stopped"])
    return result


def _work(values: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs. It needs torch, so it is imported there: a driver without torch is 400 MB smaller."""
    from pipeline.training.worker import work

    return work(values)


def _failed(error: BaseException, config: Config) -> UserError | RunError:
    """The end of a run by its workers, or by Ray Train itself; prints the traceback if it is a fault of the program."""
    cause = user_error(error, str(config.out))
    if cause:
        return UserError(f"{cause}; once that is mended, the same command goes on from the last checkpoint")
    failures = getattr(error, "worker_failures", {})
    print(traceback_of(failures), end="", file=sys.stderr, flush=True)
    why = explained(failures[min(failures)] if failures else error)
    again = config.run.max_failures if failures else 0
    tried = f", also after {again} new starts (run.max_failures)" if again else ""
    return RunError(f"the training failed{tried}: {why}; the same command goes on from the last checkpoint")


def user_error(error: BaseException, out: str) -> str:
    """The message of the `UserError` that ended a run, or an empty string.

    The controller itself touches only the run directory, so its storage errors are about that.
    """
    try:
        with storage.translated(out):
            raise getattr(error, "controller_failure", error)
    except UserError as cause:
        return str(cause)
    except Exception:
        failures = getattr(error, "worker_failures", {}).values()
        causes = [getattr(each, "cause", each) for each in failures]
        return next((str(cause) for cause in causes if isinstance(cause, UserError)), "")


def _print_result(config: Config, dataset: Dataset, progress: Progress) -> None:
    last, best = progress.last, progress.best
    assert last is not None
    assert best is not None
    print()
    print(class_table(dataset.info.classes, last.iou, best.iou))
    print(
        f"val mIoU last {100 * last.value:.2f}{counted(last.iou)} (step {last.step}), "
        f"best {100 * best.value:.2f}{counted(best.iou)} (step {best.step})"
    )
    print(f"checkpoint {config.out}/{checkpoint.name(last.step)}")
