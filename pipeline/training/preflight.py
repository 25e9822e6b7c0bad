"""Checks before anything starts: whether a config can be run, as far as can be seen without a cluster."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.checkpoint import CONFIG_FILE
from pipeline.cluster import nodes
from pipeline.cluster.connect import default_root
from pipeline.config import cli
from pipeline.config.schema import Config, identity, read_file
from pipeline.datasets.prepared.dataset import INFO_FILE, Dataset, open_dataset
from pipeline.datasets.prepared.pseudo import open_labels
from pipeline.datasets.prepared.splits import Split, load_split
from pipeline.datasets.shapes import prepare_shapes
from pipeline.errors import UserError
from pipeline.ingest.order import Source, open_sources, share_lanes
from pipeline.methods import METHODS, OPTIONS, check_durations

SHAPES_ROOT = "generated"
"""The `data.root` that means the shapes dataset, made on first use."""
BUILT_IN_WEIGHTS = ("none", "torchvision")
"""The `model.weights` that are no file."""


class Checked(NamedTuple):
    """A config that can be run, and what was opened to see that."""

    config: Config
    """With the generations of its pools."""
    dataset: Dataset
    split: Split
    sources: list[Source]


def resolve(config: Config, *, fresh: bool = False) -> Checked:
    """Opens what a config with absolute places names and refuses one that cannot be run; changes nothing.

    Raises:
        UserError: it cannot.
    """
    dataset = open_dataset(str(config.data.root))
    split = load_split(dataset, config.split, config.data.protocol)
    config, sources = with_pools(config, dataset, split, fresh)
    check_durations(config)
    check_batch(config, split, sources)
    check_val(dataset)
    check_weights(config)
    check_labels(config, dataset)
    return Checked(config, dataset, split, sources)


def resolve_paths(config: Config) -> Config:
    """The config with absolute places for data and results, valid on every worker.

    Raises:
        UserError: no dataset is named.
    """
    root = config.data.root
    if root is None:
        raise UserError("no dataset named: pass --data PATH or s3://bucket/prefix (only --preset demo makes its own)")
    if root == SHAPES_ROOT:
        root = str(default_root() / "data" / "shapes")
        if not storage.exists(storage.join(root, INFO_FILE)):
            prepare_shapes(root)
    out = config.out or f"runs/{default_name(config, root)}"
    if storage.is_local(out):
        out = str(default_root() / Path(out.removeprefix("file://")).expanduser())
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


def with_pools(config: Config, dataset: Dataset, split: Split, fresh: bool) -> tuple[Config, list[Source]]:
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
    """Refuses a split or pools that cannot fill the batches.

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
    """Refuses a dataset without validation images.

    Raises:
        UserError: it has none.
    """
    if not dataset.info.counts.get("val"):
        raise UserError(f"{dataset.root}: no validation images; prepare the dataset with a val list")


def check_weights(config: Config) -> None:
    """Refuses a file of weights that is not there.

    Raises:
        UserError: it is not.
    """
    weights = config.model.weights
    if weights not in BUILT_IN_WEIGHTS and not storage.exists(weights):
        raise UserError(f"model.weights {weights}: no such file; name one, or torchvision, or none")


def check_labels(config: Config, dataset: Dataset) -> None:
    """Refuses pseudo-labels that are missing, or that the method does not look at.

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


def check_identity(config: Config) -> None:
    """Refuses a run directory that holds another run.

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


def warn_of_local_places(config: Config) -> None:
    """Warns of local paths if the connected cluster has other nodes, which may not see them."""
    places = [config.data.root, config.out, config.model.weights, *config.data.unlabeled_pools]
    local = [place for place in places if place and place not in BUILT_IN_WEIGHTS and storage.is_local(place)]
    if local and (nodes.grows() or len(nodes.machines()) > 1):
        print(f"warning: {', '.join(local)}: must be on a disk that all nodes share; else use s3://")
