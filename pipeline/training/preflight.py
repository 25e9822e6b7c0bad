"""Checks before anything starts: whether a config can be run, as far as can be seen without a cluster."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import checkpoint, storage
from pipeline.checkpoint import CONFIG_FILE, SUMMARY_FILE
from pipeline.cluster import nodes
from pipeline.cluster.connect import default_root
from pipeline.config import cli
from pipeline.config.backbones import BUILT_IN, TIMM, check_crop
from pipeline.config.methods import OPTIONS, SPECS, check_classes, check_durations, check_frozen
from pipeline.config.schema import Config, identity, read_file
from pipeline.datasets.prepared.dataset import INFO_FILE, Dataset, open_dataset
from pipeline.datasets.prepared.pseudo import open_labels
from pipeline.datasets.prepared.splits import Split, load_split
from pipeline.datasets.shapes import prepare_shapes
from pipeline.errors import UserError
from pipeline.ingest.order import Source, open_sources, share_lanes
from pipeline.training.services import check_services

SHAPES_ROOT = "generated"
"""The `data.root` that means the shapes dataset, made on first use."""
KEY_BYTES = 1024 - 174
"""Of a run directory's key on S3 at most. S3 takes 1024; the rest is for names below it, such as TensorBoard's."""


class Checked(NamedTuple):
    """A config that can be run, and what was opened to see that."""

    config: Config
    """With the generations of its pools, and the checkpoint that it begins with."""
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
    config = with_start(config, fresh)
    check_classes(config, len(dataset.info.classes))
    check_durations(config)
    check_frozen(config)
    check_crop(config.data.crop, config.model.backbone)
    check_packages(config.model.backbone, config.model.weights)
    check_services(config)
    check_batch(config, split, sources)
    check_val(dataset)
    check_labels(config, dataset)
    check_balance(config, dataset)
    check_transform(config, dataset)
    check_bands(config, dataset)
    return Checked(config, dataset, split, sources)


def resolve_paths(config: Config) -> Config:
    """The config with absolute places for data and results, valid on every worker.

    Raises:
        UserError: no dataset is named, or the run directory's name is too long.
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
    check_key(out)
    labels = config.data.pseudo_labels
    data = replace(
        config.data,
        root=storage.absolute(root),
        unlabeled_pools=tuple(map(storage.absolute, config.data.unlabeled_pools)),
        pseudo_labels=None if labels is None else storage.absolute(labels),
    )
    weights = config.model.weights
    model = config.model if weights in BUILT_IN else replace(config.model, weights=storage.absolute(weights))
    return replace(config, data=data, model=model, out=storage.absolute(out))


def check_key(out: str) -> None:
    """Refuses a run directory below which S3 could not hold every file; of a disk, the lease asks first of all.

    Raises:
        UserError: its name is too long.
    """
    if not out.startswith("s3://"):
        return
    size = len(os.fsencode(storage.resolve(out)[1].partition("/")[2]))
    if size > KEY_BYTES:
        raise UserError(f"--out {out}: has {size} bytes below the bucket; choose a place of at most {KEY_BYTES}")


def default_name(config: Config, root: str) -> str:
    """Name of a run whose directory is not given: dataset, method, split, seed."""
    return f"{root.rstrip('/').rsplit('/', 1)[-1]}-{config.method}-{config.split}-s{config.seed}"


def with_pools(config: Config, dataset: Dataset, split: Split, fresh: bool) -> tuple[Config, list[Source]]:
    """The config with the generations of its pools that count, and the unlabeled sources.

    A run keeps the generations it began with: those of its config, while it names the same pools.
    """
    assert config.out is not None
    if not SPECS[config.method].views.unlabeled:
        return replace(config, data=replace(config.data, pool_generations=())), []
    data = config.data
    if data.unlabeled_pools and not data.pool_generations and not fresh:
        before = _begun(config)
        if before and before.data.unlabeled_pools == data.unlabeled_pools:
            data = replace(data, pool_generations=before.data.pool_generations)
    config = replace(config, data=data)
    sources = open_sources(config, dataset, split)
    pinned = tuple(source.generations for source in sources if source.generations)
    return replace(config, data=replace(data, pool_generations=pinned)), sources


def check_batch(config: Config, split: Split, sources: Sequence[Source]) -> None:
    """Refuses a split or pools that cannot fill the batches, and batches that cannot be cut into micro-batches.

    Raises:
        UserError: fewer images than a batch takes, or a number that `optim.accumulate` does not divide.
    """
    optim, both = config.optim, SPECS[config.method].views.unlabeled
    for key in ("batch_labeled", "batch_unlabeled")[: 1 + both]:
        if getattr(optim, key) % optim.accumulate:
            raise UserError(f"optim.accumulate {optim.accumulate}: must divide optim.{key} {getattr(optim, key)}")
    if len(split.labeled) < optim.batch_labeled:
        raise UserError(
            f"split {split.name} has {len(split.labeled)} labeled images, fewer than optim.batch_labeled "
            f"{optim.batch_labeled}: take a larger split or a smaller batch"
        )
    if sources:
        share_lanes(sources, optim.batch_unlabeled)


def check_balance(config: Config, dataset: Dataset) -> None:
    """Refuses to balance classes of a dataset whose index does not say which masks show them.

    Raises:
        UserError: it does not.
    """
    if config.data.balance and not dataset.classified:
        raise UserError(
            f"data.balance: {dataset.root} was prepared by an older version, which did not note the classes of each "
            "image; prepare it again"
        )


def check_bands(config: Config, dataset: Dataset) -> None:
    """Refuses means of another number of bands than images have.

    Raises:
        UserError: they are.
    """
    bands = len(dataset.info.bands) or 3
    if config.data.mean and len(config.data.mean) != bands:
        raise UserError(f"data.mean: {len(config.data.mean)} numbers, but images of {dataset.root} have {bands} bands")


def check_transform(config: Config, dataset: Dataset) -> None:
    """Tries the transform of the user's own.

    Raises:
        UserError: it cannot be imported, or fails.
    """
    if config.data.transform:
        from pipeline.ingest import transform

        transform.check(config.data.transform, config.data.crop, len(dataset.info.bands) or 3)


def check_packages(backbone: str, weights: str) -> None:
    """Refuses encoders and weights of timm's where timm is not installed.

    Raises:
        UserError: it is not.
    """
    if (backbone.startswith(TIMM) or weights == "timm") and find_spec("timm") is None:
        raise UserError("timm is not installed; pip install 'u2pl-ray[timm]'")


def check_val(dataset: Dataset) -> None:
    """Refuses a dataset without validation images.

    Raises:
        UserError: it has none.
    """
    if not dataset.info.counts.get("val"):
        raise UserError(f"{dataset.root}: no validation images; prepare the dataset with a val list")


def with_start(config: Config, fresh: bool) -> Config:
    """The config with the very checkpoint that the run begins with, if `model.weights` names another run.

    A run keeps the one it began with, as that run may train on. Once it has a checkpoint of its own, what it began with
    need not be there any more.

    Raises:
        UserError: the weights are not there, or of a network of another architecture.
    """
    weights = config.model.weights
    if weights in BUILT_IN:
        return config
    before = None if fresh else _begun(config)
    if before and before.model.weights.startswith(storage.join(weights, "")):
        weights = before.model.weights
    if not before or not checkpoint.newest(str(config.out)):
        from pipeline.training.start import check_start, find_start  # these import torch

        place = find_start(weights)
        if place is not None:
            check_start(place, config.model)
            weights = place
    return replace(config, model=replace(config.model, weights=weights))


def _begun(config: Config) -> Config | None:
    """The config of the run that is there, or None. Where its file is missing, the newest checkpoint says it."""
    uri = storage.join(str(config.out), CONFIG_FILE)
    if storage.exists(uri):
        return _config_of(uri, config)
    newest = checkpoint.newest(str(config.out))
    return None if newest is None else cli.resolve(checkpoint.read_meta(newest).config, OPTIONS)


def check_labels(config: Config, dataset: Dataset) -> None:
    """Refuses pseudo-labels that are missing, or that the method does not look at.

    Raises:
        UserError: they are missing, of other images, or nobody would look at them.
    """
    labels, needed = config.data.pseudo_labels, SPECS[config.method].views.pseudo
    if needed and labels is None:
        raise UserError(f"method {config.method} needs data.pseudo_labels; `u2pl self_training` makes and uses them")
    if labels is not None and not needed:
        raise UserError(f"data.pseudo_labels: method {config.method} uses none; leave it out")
    if labels is not None and config.data.unlabeled_pools:
        raise UserError("data.unlabeled_pools: pseudo-labels are of the dataset's own images; leave the pools out")
    if labels is not None:
        open_labels(labels, dataset)


def check_identity(config: Config) -> None:
    """Refuses a run directory that holds another run. One that has come to no checkpoint is none: it would begin anew.

    Raises:
        UserError: it is another one.
    """
    out = str(config.out)
    written = storage.exists(storage.join(out, CONFIG_FILE))
    if checkpoint.newest(out) is None and not (written and storage.exists(storage.join(out, SUMMARY_FILE))):
        return
    before = _begun(config)
    assert before is not None
    if not written:  # a checkpoint holds what the dataset says
        known = {"background": before.data.background} if config.data.background == "auto" else {}
        known |= {} if config.data.mean else {"mean": before.data.mean, "std": before.data.std}
        config = replace(config, data=replace(config.data, **known))
    _, difference = _difference(identity(before), identity(config))
    if difference:
        raise UserError(f"{config.out} holds a run with {difference}; delete it (--fresh does) or use another --out")


def _config_of(uri: str, config: Config) -> Config:
    """What a run's config.yaml says, in which nothing is missing that `config` has."""
    try:
        stored = read_file(uri)
        before = cli.resolve(stored, OPTIONS)
        key, _ = _difference(identity(before), identity(config))
        if key and not _has(stored, key):
            raise UserError(f"{key} is missing")
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # the storage's own
            raise
        remedy = "delete the file, then the same command goes on, as the checkpoints hold the config, too"
        raise UserError(f"{uri}: damaged, or of another version ({error}); {remedy}") from error
    return before


def _difference(before: dict[str, Any], after: dict[str, Any], path: str = "") -> tuple[str, str]:
    """The first key, in the config's order, in which two configs differ, and how; or empty strings."""
    for key in {**after, **before}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = _difference(old, new, f"{path}{key}.")
            if inner[0]:
                return inner
        elif old != new:
            return f"{path}{key}", f"{path}{key} {old} instead of {new}"
    return "", ""


def _has(values: Mapping[str, Any], key: str) -> bool:
    """Whether nested values have a dotted key."""
    section, dot, rest = key.partition(".")
    inner = values.get(section)
    return section in values and (not dot or (isinstance(inner, Mapping) and _has(inner, rest)))


def warn_of_local_places(config: Config) -> None:
    """Warns of local paths if the connected cluster has other nodes, which may not see them."""
    places = [config.data.root, config.out, config.model.weights, *config.data.unlabeled_pools]
    local = [place for place in places if place and place not in BUILT_IN and storage.is_local(place)]
    if local and (nodes.grows() or len(nodes.machines()) > 1):
        print(f"warning: {', '.join(local)}: must be on a disk that all nodes share; else use s3://")
