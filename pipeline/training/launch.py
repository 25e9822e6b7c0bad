"""From a config to a finished run on Ray Train: checks first, then workers, then the result."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import checkpoint, cli, cluster, storage
from pipeline.checkpoint import CONFIG_FILE, LOG_FILE, METRICS_FILE, SUMMARY_FILE, Progress
from pipeline.config import Config, as_dict, identity, read_file, to_yaml
from pipeline.datasets.format import Dataset, open_dataset
from pipeline.datasets.pseudo import open_labels
from pipeline.datasets.shapes import prepare_shapes
from pipeline.datasets.splits import Split, load_split
from pipeline.errors import UserError
from pipeline.ingest.mixture import Source, open_sources, share_lanes
from pipeline.methods import METHODS, OPTIONS, check_durations
from pipeline.report.tables import class_table
from pipeline.training.claim import CLAIM_FILE
from pipeline.training.meter import Diverged
from pipeline.training.scaling import Workers, workers_of

GENERATED = "generated"
"""Value of `data.root` that stands for the demo set."""
RUN_FILES = {
    CONFIG_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    LOG_FILE,
    CLAIM_FILE,
    "tensorboard",
    "checkpoint_manager_snapshot.json",
    ".validate_storage_marker",
}
"""What a run leaves beside its checkpoints."""
BUILT_IN_WEIGHTS = ("none", "torchvision")
"""Values of `model.weights` that are no place."""


def launch(config: Config, *, fresh: bool = False, callbacks: Sequence[Any] = ()) -> Progress:
    """Runs a config on the cluster and prints the result; a run that was cut off goes on where it was.

    Args:
        config: checked config; without a dataset the demo set is made first.
        fresh: delete what is in the run directory and start anew.
        callbacks: `ray.train.UserCallback`s that are told of checkpoints.

    Raises:
        UserError: something in the config, the data or the run directory cannot be used; found before any worker
            starts as far as possible.
    """
    config, dataset, split, sources = check(placed(config), fresh=fresh)
    _claim(config, fresh)
    done = storage.join(str(config.out), SUMMARY_FILE)
    if storage.exists(done):
        print(f"{config.out} is finished; --fresh trains it anew")
        progress = Progress.from_dict(json.loads(storage.read_bytes(done)))
    else:
        cluster.connect()
        workers = workers_of(config)
        _announce(config, dataset, split, sources, workers)
        warn_of_local_places(config)
        progress = Progress.from_dict(_fit(config, workers, callbacks))
        summary = json.dumps(asdict(progress), indent=1).encode()
        storage.retried(lambda: storage.write_bytes(done, summary))
    _print_result(config, dataset, progress)
    return progress


class Checked(NamedTuple):
    """A config that can be run, and what was opened to see that."""

    config: Config
    """With the generations of its pools."""
    dataset: Dataset
    split: Split
    sources: list[Source]


def check(config: Config, *, fresh: bool = False) -> Checked:
    """Whether a placed config can be run, as far as can be seen without a cluster; changes nothing.

    Raises:
        UserError: it cannot.
    """
    dataset = open_dataset(str(config.data.root))
    split = load_split(dataset, config.split, config.data.protocol)
    config, sources = _with_pools(config, dataset, split, fresh)
    check_durations(config)
    check_batch(config, split, sources)
    check_val(dataset)
    check_weights(config)
    check_labels(config, dataset)
    return Checked(config, dataset, split, sources)


def placed(config: Config) -> Config:
    """The config with absolute places for data and results, valid on every worker.

    Raises:
        UserError: no dataset is named.
    """
    root = config.data.root
    if root is None:
        raise UserError("no dataset named: pass --data PATH or s3://bucket/prefix (only --preset demo makes its own)")
    if root == GENERATED:
        root = str(cluster.default_root() / "data" / "shapes")
        prepare_shapes(root)
    out = config.out or f"runs/{default_name(config, root)}"
    if storage.is_local(out):
        out = str(cluster.default_root() / Path(out.removeprefix("file://")).expanduser())
    labels = config.data.pseudo_labels
    data = replace(
        config.data,
        root=storage.absolute(root),
        unlabeled_pools=tuple(map(storage.absolute, config.data.unlabeled_pools)),
        pseudo_labels=None if labels is None else storage.absolute(labels),
    )
    weights = config.model.weights
    model = config.model if weights in BUILT_IN_WEIGHTS else replace(config.model, weights=storage.absolute(weights))
    return replace(config, data=data, model=model, out=storage.absolute(out))


def default_name(config: Config, root: str) -> str:
    """Name of a run whose directory is not given: dataset, method, split, seed."""
    return f"{root.rstrip('/').rsplit('/', 1)[-1]}-{config.method}-{config.split}-s{config.seed}"


def _with_pools(config: Config, dataset: Dataset, split: Split, fresh: bool) -> tuple[Config, list[Source]]:
    """The config with the generations of its pools that count, and the unlabeled sources.

    A run keeps the generations it began with: those of its config, while it names the same pools.
    """
    assert config.out is not None
    if not METHODS[config.method].views.unlabeled:
        return replace(config, data=replace(config.data, pool_generations=())), []
    data, uri = config.data, storage.join(config.out, CONFIG_FILE)
    if data.unlabeled_pools and not data.pool_generations and not fresh and storage.exists(uri):
        before = cli.resolve(read_file(uri), OPTIONS).data
        if before.unlabeled_pools == data.unlabeled_pools:
            data = replace(data, pool_generations=before.pool_generations)
    config = replace(config, data=data)
    sources = open_sources(config, dataset, split)
    pinned = tuple(source.generations for source in sources if source.generations)
    return replace(config, data=replace(data, pool_generations=pinned)), sources


def check_batch(config: Config, split: Split, sources: Sequence[Source]) -> None:
    """Whether the split and the pools can fill the batches.

    Raises:
        UserError: fewer images than a batch takes.
    """
    optim = config.optim
    if len(split.labeled) < optim.batch_labeled:
        raise UserError(
            f"split {split.name} has {len(split.labeled)} labeled images, fewer than optim.batch_labeled "
            f"{optim.batch_labeled}: take a larger split or a smaller batch"
        )
    if sources:
        share_lanes(sources, optim.batch_unlabeled)


def check_val(dataset: Dataset) -> None:
    """Whether there is something to score on.

    Raises:
        UserError: there is not.
    """
    if not dataset.info.counts.get("val"):
        raise UserError(f"{dataset.root}: no validation images; prepare the dataset with a val list")


def check_weights(config: Config) -> None:
    """Whether a file of weights is there.

    Raises:
        UserError: it is not.
    """
    weights = config.model.weights
    if weights not in BUILT_IN_WEIGHTS and not storage.exists(weights):
        raise UserError(f"model.weights {weights}: no such file; name one, or torchvision, or none")


def check_labels(config: Config, dataset: Dataset) -> None:
    """Whether pseudo-labels are there exactly if the method needs them.

    Raises:
        UserError: they are missing, of other images, or nobody would look at them.
    """
    labels, needed = config.data.pseudo_labels, METHODS[config.method].views.pseudo
    if needed and labels is None:
        raise UserError(f"method {config.method} needs data.pseudo_labels; `u2pl self_training` makes and uses them")
    if labels is not None and not needed:
        raise UserError(f"data.pseudo_labels: method {config.method} uses none; leave it out")
    if labels is not None and config.data.unlabeled_pools:
        raise UserError("data.unlabeled_pools: pseudo-labels are of the dataset's own images; leave the pools out")
    if labels is not None:
        open_labels(labels, dataset)


def _claim(config: Config, fresh: bool) -> None:
    """Makes the run directory this run's and writes its config."""
    assert config.out is not None
    uri = storage.join(config.out, CONFIG_FILE)
    if fresh:
        delete_run(config.out)
    storage.check_writable(config.out)
    check_same(config)
    storage.write_bytes(uri, to_yaml(config).encode())


def delete_run(out: str) -> None:
    """Deletes what a run has written into its directory, and nothing else."""
    for name in {file.split("/")[0] for file in storage.list_files(out)}:
        if name in RUN_FILES or checkpoint.is_name(name):
            storage.delete(storage.join(out, name))


def check_same(config: Config) -> None:
    """Whether a run that is there already is this one.

    Raises:
        UserError: it is another one.
    """
    uri = storage.join(str(config.out), CONFIG_FILE)
    if storage.exists(uri):
        before = identity(cli.resolve(read_file(uri), OPTIONS))
        difference = _difference(before, identity(config))
        if difference:
            raise UserError(
                f"{config.out} holds a run with {difference}; delete it (--fresh does) or use another --out"
            )


def _difference(before: dict[str, Any], after: dict[str, Any], path: str = "") -> str:
    """The first key, in the config's order, in which two configs differ, or an empty string."""
    for key in {**after, **before}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = _difference(old, new, f"{path}{key}.")
            if inner:
                return inner
        elif old != new:
            return f"{path}{key} {old} instead of {new}"
    return ""


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
    if config.data.unlabeled_pools:
        for source, lanes in zip(sources, share_lanes(sources, optim.batch_unlabeled) if sources else (), strict=True):
            pinned = f", generations 1 to {source.generations}" if source.generations else ""
            print(f"unlabeled: {lanes} of {optim.batch_unlabeled} from {source.name} ({source.images} images{pinned})")


def warn_of_local_places(config: Config) -> None:
    """Says which places other nodes of the connected cluster may not see."""
    places = [config.data.root, config.out, config.model.weights, *config.data.unlabeled_pools]
    local = [place for place in places if place and place not in BUILT_IN_WEIGHTS and storage.is_local(place)]
    if local and (cluster.grows() or len(cluster.machines()) > 1):
        print(f"warning: {', '.join(local)}: must be on a disk that all nodes share; else use s3://")


def _fit(config: Config, workers: Workers, callbacks: Sequence[Any]) -> dict[str, Any]:
    """Runs the workers under Ray Train; returns rank 0's progress."""
    import ray.train
    from ray.train.torch import TorchConfig

    # these import Ray, which must not happen before `connect`
    from pipeline.training.console import LostWorkers, relayed
    from pipeline.training.elastic import Trainer
    from pipeline.training.worker import work

    assert config.out is not None
    filesystem, path = storage.resolve(config.out)
    parent, _, name = path.rpartition("/")
    with relayed() as console:
        trainer = Trainer(
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
                    num_to_keep=1, checkpoint_score_attribute="score", checkpoint_score_order="max"
                ),
            ),
        )
        try:
            result: dict[str, Any] = trainer.fit().return_value  # type: ignore[assignment]
        except ray.train.TrainingFailedError as error:
            cause = _user_error(error, config.out)
            if cause:
                goes_on = "once that is mended, the same command goes on from the last checkpoint"
                raise UserError(f"{cause}; {goes_on}") from error
            raise
    if "user_error" in result:
        raise UserError(result["user_error"])
    if "diverged" in result:
        raise Diverged(f"{result['diverged']}; the last checkpoint before it is in {config.out}")
    return result


def _user_error(error: BaseException, out: str) -> str:
    """What a user can do something about, if that is why the run failed.

    The controller itself touches nothing but the run directory: its storage errors are about that.
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
    print(f"val mIoU last {100 * last.value:.2f} (step {last.step}), best {100 * best.value:.2f} (step {best.step})")
    print(f"checkpoint {config.out}/{checkpoint.name(last.step)}")
