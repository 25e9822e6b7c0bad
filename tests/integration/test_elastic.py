"""Inside real Ray Train workers, any number of them makes the same global batches, also after a kill."""

import hashlib
import itertools
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray.train
import torch
from torch import Tensor

from pipeline.batch import Views
from pipeline.config import cli
from pipeline.config.methods import ViewSpec
from pipeline.config.schema import Config, as_dict
from pipeline.datasets.images import encode_png
from pipeline.datasets.pools.make import make_pool
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.ingest import read
from pipeline.ingest.groups import UNLABELED
from pipeline.ingest.loader import Loader
from pipeline.ingest.order import Mixture, Unit, open_sources
from pipeline.ingest.read import SampleStream, read_inline, read_ray, share
from pipeline.methods import OPTIONS
from pipeline.patience import Patience
from tests.processes import kill, named, wait_for

STEPS, KILLED = 54, 23
"""Of 8 unlabeled images, 4 of them from the pool: more than an epoch of both sources. 23 is within row groups."""
POOL = 40

pytestmark = pytest.mark.usefixtures("ray_cluster")

Sequence = list[list[list[str]]]
"""By step and place in the global batch: id, and hashes of the weak and the strong views."""


@pytest.fixture
def config(shapes: str, tmp_path: Path) -> Config:
    (tmp_path / "raw").mkdir()
    for number in range(POOL):
        pixels = np.random.default_rng(number).integers(0, 255, (60, 80, 3), np.uint8)
        (tmp_path / "raw" / f"{number}.png").write_bytes(encode_png(pixels))
    pool = str(tmp_path / "pool")
    make_pool("images", str(tmp_path / "raw"), pool)
    flags = ["--preset", "demo", "--split", "1_2", "--data", shapes, "--data.unlabeled_pools", pool]
    flags += ["--data.pool_weights", "1", "1", "--optim.batch_labeled", "4", "--optim.batch_unlabeled", "8"]
    return cli.parse_config(flags, "test", OPTIONS)[0]


@pytest.mark.night
def test_any_number_of_workers_makes_the_same_batches(config: Config, tmp_path: Path) -> None:
    """One worker; and four up to a kill, then two. The one shares the labeled images, the four stream them."""
    one = trained(config, tmp_path / "one", workers=1, labeled="shared")
    assert len(one) == STEPS
    four = tmp_path / "four"
    with pytest.raises(ray.train.TrainingFailedError):
        trained(config, four, workers=4, hold=KILLED, labeled="streamed")
    before = recorded(four)
    assert len(before) == KILLED
    after = trained(config, tmp_path / "rest", workers=2, start=KILLED)
    assert before + after == one
    each_image_once(config, one)


def each_image_once(config: Config, sequence: Sequence) -> None:
    """Nothing is left out or comes twice within a virtual epoch of any source."""
    dataset = open_dataset(str(config.data.root))
    split = load_split(dataset, config.split)
    lanes = range(config.optim.batch_unlabeled)
    plan = Mixture(open_sources(config, dataset, split), len(lanes), config.seed)
    planned = list(itertools.islice(SampleStream(plan, lanes, 0, read_inline, None, Patience()), STEPS))
    places = slice(config.optim.batch_labeled, None)
    assert [[row[0] for row in step[places]] for step in sequence] == [[each.id for each in step] for step in planned]
    counts = Counter((each.epoch, each.id) for step in planned for each in step)
    assert set(counts.values()) == {1}
    assert len([1 for epoch, _ in counts if epoch == 0]) == POOL + len(split.unlabeled)


def trained(
    config: Config, folder: Path, *, workers: int, start: int = 0, hold: int = STEPS, labeled: str = "held"
) -> Sequence:
    """What workers saw; if they hold before the end, one of them is killed then."""
    from ray.train.torch import TorchTrainer

    folder.mkdir()
    dataset = open_dataset(str(config.data.root))
    ids = load_split(dataset, config.split).labeled
    blocks = share(dataset, ids, Patience()) if labeled == "shared" else []
    assert bool(blocks) == (labeled == "shared")
    values = {"config": as_dict(config), "folder": str(folder), "start": start, "hold": hold, "blocks": blocks}
    values["bytes"] = 0 if labeled == "streamed" else read.HELD_BYTES
    trainer = TorchTrainer(
        record,
        train_loop_config=values,
        scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.25}),
        run_config=ray.train.RunConfig(name="run", storage_path=str(folder / "ray")),
    )
    if hold < STEPS:
        threading.Thread(target=assassin, args=(folder, workers, hold), daemon=True).start()
    trainer.fit()
    return recorded(folder)


def assassin(folder: Path, workers: int, steps: int) -> None:
    def arrived() -> bool:
        files = list(folder.glob("rank-*"))
        return len(files) == workers and all(len(file.read_text().splitlines()) == steps for file in files)

    wait_for("all workers", arrived, 300)
    kill(named(os.getpid(), "RayTrainWorker")[0])


def recorded(folder: Path) -> Sequence:
    """The global batches, put together from those of the ranks."""
    ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(folder.glob("rank-*"))]
    return [[*itertools.chain(*(rank[0] for rank in step)), *itertools.chain(*(rank[1] for rank in step))]
            for step in zip(*ranks, strict=True)]  # fmt: skip


def record(values: dict[str, Any]) -> None:
    """Runs in each train worker: writes down its batches."""
    torch.set_num_threads(1)
    config = cli.resolve(values["config"], OPTIONS)
    dataset = open_dataset(str(config.data.root))
    context = ray.train.get_context()
    read.HELD_BYTES = values["bytes"]
    loader = Loader(
        config, dataset, load_split(dataset, config.split), ViewSpec(unlabeled=True, strong=2),
        rank=context.get_world_rank(), world=context.get_world_size(), start=values["start"], threads=2,
        reader=read_ray if not values["blocks"] else unlabeled_alone, shared=values["blocks"],
    )  # fmt: skip
    with (Path(values["folder"]) / f"rank-{context.get_world_rank()}").open("w", buffering=1) as file:
        for _, batch in zip(range(values["start"], values["hold"]), loader, strict=False):
            assert batch.unlabeled is not None
            file.write(json.dumps([told(batch.labeled), told(batch.unlabeled)]) + "\n")
    if values["hold"] < STEPS:
        threading.Event().wait()
    loader.close()


def unlabeled_alone(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
    """The reader of a worker that finds the labeled images in the object store."""
    for unit, table in read_ray(units, labels, patience):
        assert unit.group.columns == UNLABELED
        yield unit, table


def told(views: Views) -> list[list[str]]:
    """Id and hashes of each sample's views."""
    masks = [] if views.mask is None else [views.mask]
    tensors = [views.image, views.valid, *masks, *views.strong]
    return [[name, *(digest(tensor[place]) for tensor in tensors)] for place, name in enumerate(views.ids)]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
