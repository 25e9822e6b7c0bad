"""The loader inside a real Ray Train worker: the switch of where to decode, and what waiting costs."""

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.batch import Batch
from pipeline.config import cli
from pipeline.config.methods import ViewSpec
from pipeline.config.schema import Config, as_dict
from pipeline.datasets.prepared.dataset import open_dataset, read_group
from pipeline.datasets.prepared.splits import load_split
from pipeline.errors import UserError
from pipeline.ingest.groups import select_groups
from pipeline.ingest.loader import Loader
from pipeline.ingest.order import LanePlan
from pipeline.ingest.read import read_inline, read_ray
from pipeline.methods import OPTIONS
from pipeline.patience import Patience
from pipeline.training.launch import launch
from pipeline.training.runtime import PlainRuntime
from pipeline.training.trainer import train
from tests.jobs import records

BASE = ["--preset", "demo", "--split", "1_16", "--run.log_every", "1", "--run.tensorboard", "false"]


def configured(*flags: str) -> Config:
    config, _ = cli.parse_config([*BASE, *flags], "test", OPTIONS)
    return config


def opened(config: Config, **options: Any) -> Loader:
    dataset = open_dataset(str(config.data.root))
    settings = {"rank": 0, "world": 1, "start": 0, "threads": 1, "reader": read_inline, **options}
    return Loader(config, dataset, load_split(dataset, config.split), ViewSpec(unlabeled=True, strong=1), **settings)


def tensors(batch: Batch) -> Iterator[torch.Tensor]:
    for side in (batch.labeled, batch.unlabeled):
        assert side is not None
        yield from (tensor for tensor in (side.image, side.mask, side.valid, *side.strong) if tensor is not None)


@pytest.mark.usefixtures("ray_cluster")
class TestLoader:
    def test_batches_decoded_on_the_cluster_are_the_same(self, shapes: str) -> None:
        config = configured("--data", shapes)
        here = opened(config)
        there = opened(replace(config, run=replace(config.run, decode="cluster")), reader=read_ray)
        try:
            for one, two in itertools.islice(zip(here, there, strict=False), 12):
                for mine, other in zip(tensors(one), tensors(two), strict=True):
                    assert mine.dtype == other.dtype
                    assert torch.equal(mine, other)
                for tensor in tensors(two):
                    tensor.numpy()[:] = 0  # writable, and no memory of the object store
            assert there.stats.samples >= here.stats.samples > 0
            assert there.stats.encoded == here.stats.encoded
            assert there.stats.decoding > 0
        finally:
            here.close()
            there.close()

    def test_the_tasks_never_touch_a_mask(self, shapes: str, tmp_path: Path) -> None:
        """Every page of masks is damaged, which checksums would tell whoever read one."""
        copy = tmp_path / "copy"
        shutil.copytree(shapes, copy)
        for shard in (copy / "shards").glob("train-*"):
            spoil_masks(shard)
        dataset = open_dataset(str(copy))
        names = dataset.subset("train")["id"].to_pylist()
        groups = select_groups(dataset, names)
        with pytest.raises(UserError, match="is damaged"):
            read_group(str(copy), groups[0].shard, groups[0].row_group, ["mask"])
        units = list(itertools.islice(LanePlan(groups, 1, 0).units(range(1), 0), len(groups)))
        whole = {name: image for _, table in read_inline(units, None, Patience()) for name, image in pairs(table)}
        assert whole.keys() == set(names)
        found: dict[str, bytes] = {}
        for _, table in itertools.islice(read_ray(itertools.cycle(units), None, Patience()), len(units)):
            assert table.column_names == ["id", "image"]
            found.update(pairs(table))
        assert found == whole

    @pytest.mark.night
    def test_a_run_that_decodes_on_the_cluster_equals_one_that_does_not(self, shapes: str, tmp_path: Path) -> None:
        here, there = str(tmp_path / "here"), str(tmp_path / "there")
        flags = ["--data", shapes, "--method", "fixmatch", "--optim.steps", "4"]
        train(configured(*flags, "--out", here), PlainRuntime(here))
        launch(configured(*flags, "--out", there, "--scaling.workers", "1", "--run.decode", "cluster"))
        found = [records(run) for run in (here, there)]
        assert [record["total"] for record in found[0]] == [record["total"] for record in found[1]]
        for record in itertools.chain(*found):
            assert record["bytes_per_second"] > 0
            assert record["decode_ms"] > 0
            assert record["images_per_second"] > 0
            assert 0 <= record["stall"] <= 1
            assert (record["retries"], record["skipped"]) == (0, 0)

    def test_waiting_for_the_training_loop_costs_nothing(self, shapes: str) -> None:
        """Steps of 0.5 s: the worker neither spins nor reads and decodes further and further ahead."""
        import ray.train
        from ray.train.torch import TorchTrainer

        config = configured("--data", shapes, "--data.crop", "128,128")
        trainer = TorchTrainer(
            slow_consumer,
            train_loop_config={"config": as_dict(config)},
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
        )
        result: dict[str, Any] = trainer.fit().return_value  # type: ignore[assignment]
        assert result["busy"] < 0.05, result
        assert result["grown"] < 32e6, result


def spoil_masks(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    meta = pq.ParquetFile(shard).metadata
    for group in range(meta.num_row_groups):
        mask = meta.row_group(group).column(meta.schema.names.index("mask"))
        end = mask.data_page_offset + mask.total_compressed_size
        for place in range(mask.data_page_offset + mask.total_compressed_size // 2, end):
            data[place] ^= 255
    shard.write_bytes(data)


def pairs(table: pa.Table) -> list[tuple[str, bytes]]:
    return list(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))


def slow_consumer(values: dict[str, Any]) -> dict[str, float]:
    """Runs in the train worker; its own share of a core over twelve steps, less what the views themselves cost."""
    torch.set_num_threads(1)
    loader = opened(cli.resolve(values["config"], OPTIONS), reader=read_ray)
    batches = iter(loader)
    for _ in range(12):
        next(batches)
    time.sleep(1)  # what is read and decoded ahead
    spent, decoded, memory, began = time.process_time(), loader.stats.decoding, resident(), time.monotonic()
    for _ in range(12):
        next(batches)
        time.sleep(0.5)
    seconds = time.monotonic() - began
    used = time.process_time() - spent - (loader.stats.decoding - decoded)
    grown = resident() - memory
    loader.close()
    return {"busy": used / seconds, "grown": grown}


def resident() -> float:
    """Bytes of this process's memory, without what it shares with the object store."""
    pages = (Path("/proc") / str(os.getpid()) / "statm").read_text().split()
    return float((int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE"))
