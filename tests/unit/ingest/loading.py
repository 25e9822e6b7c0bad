"""Loaders of the shapes dataset, and what they give."""

import itertools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import torch

from pipeline.batch import Batch, Views
from pipeline.config.cli import resolve
from pipeline.config.methods import ViewSpec
from pipeline.config.schema import Config
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.ingest.groups import UNLABELED
from pipeline.ingest.loader import Loader
from pipeline.ingest.order import Unit
from pipeline.ingest.read import Reader, read_inline
from pipeline.methods import OPTIONS
from pipeline.patience import Patience

DAMAGED = b"this is no picture"
STRONG = ViewSpec(unlabeled=True, strong=2)


def configured(root: str, **data: Any) -> Config:
    return resolve(
        {
            "split": "1_4",
            "data": {"root": root, "crop": [40, 32], **data},
            "optim": {"batch_labeled": 4, "batch_unlabeled": 6},
        },
        OPTIONS,
    )


def loader_of(config: Config, rank: int = 0, world: int = 1, start: int = 0, **options: Any) -> Loader:
    dataset = open_dataset(str(config.data.root))
    split = load_split(dataset, config.split, config.data.protocol)
    settings = {"threads": 1, "reader": read_inline, "spec": ViewSpec(unlabeled=True), **options}
    spec = settings.pop("spec")
    return Loader(config, dataset, split, spec, rank=rank, world=world, start=start, **settings)


def take(config: Config, count: int, **options: Any) -> list[Batch]:
    loader = loader_of(config, **options)
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def on_unlabeled(reader: Reader) -> Reader:
    """A reader that reads labeled images as ever."""

    def read(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
        units = iter(units)
        first = next(units)
        chosen = reader if first.group.columns == UNLABELED else read_inline
        return chosen(itertools.chain([first], units), labels, patience)

    return read


def producing() -> list[threading.Thread]:
    """The producers of all loaders of this process that still run."""
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def equal(one: Views | None, two: Views | None) -> bool:
    if one is None or two is None:
        return one is two
    masks = one.mask is two.mask if one.mask is None or two.mask is None else torch.equal(one.mask, two.mask)
    return one.ids == two.ids and torch.equal(one.image, two.image) and torch.equal(one.valid, two.valid) and masks


def same(one: list[Batch], two: list[Batch]) -> bool:
    return len(one) == len(two) and all(
        equal(a.labeled, b.labeled) and equal(a.unlabeled, b.unlabeled) for a, b in zip(one, two, strict=True)
    )


def both_views(batch: Batch) -> tuple[Views, Views]:
    assert batch.unlabeled is not None
    return batch.labeled, batch.unlabeled


# ---- what a batch is ------------------------------------------------------------------------------------------
