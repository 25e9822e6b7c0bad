"""From a config to a finished run on Ray Train: checks first, then workers, then the result."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline import checkpoint, storage
from pipeline.checkpoint import CONFIG_FILE, LOG_FILE, METRICS_FILE, SUMMARY_FILE, Progress, read_summary
from pipeline.cluster.connect import connect
from pipeline.cluster.nodes import Workers
from pipeline.config.schema import Config, as_dict, to_yaml
from pipeline.datasets.prepared.dataset import Dataset
from pipeline.datasets.prepared.splits import Split
from pipeline.errors import UserError
from pipeline.inference.evaluate import class_table, counted
from pipeline.ingest.order import Source, share_lanes
from pipeline.methods import METHODS
from pipeline.storage import Patience
from pipeline.training.lease import LEASE_FILE
from pipeline.training.meter import Diverged
from pipeline.training.preflight import check_identity, resolve, resolve_paths, warn_of_local_places
from pipeline.training.recovery import RECORD_FILE, recover
from pipeline.training.scaling import workers_of

RUN_FILES = {
    CONFIG_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    LOG_FILE,
    LEASE_FILE,
    "tensorboard",
    RECORD_FILE,
    ".validate_storage_marker",
}
"""Names that a run writes beside its checkpoints."""


def launch(
    config: Config, *, fresh: bool = False, resume_from: str | None = None, callbacks: Sequence[Any] = ()
) -> Progress:
    """Runs a config on the cluster and prints the result; a run that was cut off goes on where it was.

    Args:
        config: checked config; for `data.root` generated the shapes dataset is made first.
        fresh: delete what is in the run directory and start anew.
        resume_from: name of the checkpoint to go on from, which may be of a finished run; None: the newest whole one.
        callbacks: `ray.train.UserCallback`s that are told of checkpoints.

    Raises:
        UserError: something in the config, the data or the run directory cannot be used; found before any worker
            starts as far as possible.
    """
    config, dataset, split, sources = resolve(resolve_paths(config), fresh=fresh)
    begin_run(config, fresh)
    done = storage.join(str(config.out), SUMMARY_FILE)
    if resume_from is None and storage.exists(done):
        print(f"{config.out} is finished; --fresh trains it anew")
        progress = read_summary(done)
    else:
        connect()
        Patience(config.run.storage_patience).retried(lambda: recover(str(config.out), resume_from))
        storage.delete(done)  # there only if an earlier checkpoint was chosen
        workers = workers_of(config)
        _announce(config, dataset, split, sources, workers)
        warn_of_local_places(config)
        progress = Progress.from_dict(_fit(config, workers, callbacks))
        summary = json.dumps(asdict(progress), indent=1).encode()
        Patience(config.run.storage_patience).retried(lambda: storage.write_bytes(done, summary))
    _print_result(config, dataset, progress)
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


def _announce(config: Config, dataset: Dataset, split: Split, sources: Sequence[Source], workers: Workers) -> None:
    optim = config.optim
    unlabeled = f" + {optim.batch_unlabeled} unlabeled" if METHODS[config.method].views.unlabeled else ""
    print(
        f"{config.method} on {dataset.info.name}, split {split.name}: {len(split.labeled)} labeled, "
        f"{len(split.unlabeled)} unlabeled images, list {split.digest}\n"
        f"{' or '.join(map(str, workers.counts))} workers, global batch {optim.batch_labeled} labeled{unlabeled}, "
        f"lr {optim.lr:g} "
        f"(head x{optim.head_lr_mult:g}; not scaled by workers: the batch is global), {optim.steps} steps\n"
        f"results in {config.out}",
        flush=True,
    )
    unseen = dataset.info.unseen("val")
    if unseen:
        classes = len(dataset.info.classes)
        print(
            f"the validation set shows none of {', '.join(unseen)}: where the network names none either, mIoU is over "
            f"{classes - len(unseen)} of {classes} classes",
            flush=True,
        )
    if config.data.unlabeled_pools:
        for source, lanes in zip(sources, share_lanes(sources, optim.batch_unlabeled) if sources else (), strict=True):
            pinned = f", generations 1 to {source.generations}" if source.generations else ""
            print(f"unlabeled: {lanes} of {optim.batch_unlabeled} from {source.name} ({source.images} images{pinned})")


def _fit(config: Config, workers: Workers, callbacks: Sequence[Any]) -> dict[str, Any]:
    """Runs the workers under Ray Train; returns rank 0's progress."""
    import ray.train
    from ray.train.torch import TorchConfig

    # these import Ray, which must not happen before `connect`
    from pipeline.cluster.console import LostWorkers, relayed
    from pipeline.cluster.elastic import ElasticTrainer
    from pipeline.training.worker import work

    assert config.out is not None
    filesystem, path = storage.resolve(config.out)
    parent, _, name = path.rpartition("/")
    with relayed() as console:
        trainer = ElasticTrainer(
            work,
            train_loop_config={"config": as_dict(config), "console": console},
            torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo", timeout_s=300),
            workers=workers,
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=parent,
                storage_filesystem=filesystem,
                callbacks=[LostWorkers(console), *callbacks],
                # nodes that were taken away with notice are not counted
                failure_config=ray.train.FailureConfig(
                    max_failures=config.run.max_failures, max_preemption_failures=-1
                ),
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=2, checkpoint_score_attribute="score", checkpoint_score_order="max"
                ),
            ),
        )
        try:
            result: dict[str, Any] = trainer.fit().return_value  # type: ignore[assignment]
        except ray.train.TrainingFailedError as error:
            cause = user_error(error, config.out)
            if cause:
                goes_on = "once that is mended, the same command goes on from the last checkpoint"
                raise UserError(f"{cause}; {goes_on}") from error
            raise
    if "user_error" in result:
        raise UserError(result["user_error"])
    if "diverged" in result:
        raise Diverged(f"{result['diverged']}; the last checkpoint before it is in {config.out}")
    return result


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
