"""Images per CPU-second from storage to batch, beside the limit: one thread that decodes the same bytes from memory.

    python benchmarks/ingest.py [--images 4096] [--steps 264] [--rounds 5] [--threads 1]

Inside a real train worker (Ray Train, one worker), a round of each way in turn, so that ratios hold on a machine whose
speed drifts:

    in memory      decoding and views in one thread, of bytes that are there already; counts that thread alone
    plain Pillow   the same without the project's decode path: decode, resize, crop
    Parquet, disk  the project's loader: Ray Data reads, `--threads` threads decode
    Parquet, S3    the same from a SeaweedFS on this machine, whose own time is not counted
    DataLoader     torch's, two worker processes, the same decode path on the same images as files

CPU time is that of the whole process tree: driver, raylet, gcs, all workers. `net` subtracts what the tree takes while
nothing is asked of it. Every way is started and warmed up before the clock runs. The images are made once: 500x375
JPEGs of about 55 kB, views of 513x513 at scale 0.5 to 2, one labeled and 15 unlabeled ones a step.
"""

import argparse
import importlib
import io
import itertools
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installation, like the jobs

from benchmarks.photographs import HEIGHT, WIDTH, make_images
from pipeline.config.methods import ViewSpec
from pipeline.config.schema import Config, DataConfig, OptimConfig
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.ingest.augment import ViewRecipe, empty_views, fill
from pipeline.ingest.groups import LABELED, select_groups, select_images
from pipeline.ingest.loader import Loader
from pipeline.ingest.order import LanePlan, generator
from pipeline.ingest.read import Sample, SampleStream, read_inline, read_ray
from pipeline.patience import Patience
from tests.processes import descendants
from tests.s3 import S3Server

WARM_STEPS = 24
"""Steps before each measurement: they empty what was made ahead while the others had their turn."""
SETTLE_SECONDS = 3.0
CONFIG = Config(data=DataConfig(), optim=OptimConfig(batch_labeled=1, batch_unlabeled=15))
IMAGES = CONFIG.optim.batch_labeled + CONFIG.optim.batch_unlabeled
"""Images per step."""

Way = Callable[[int], tuple[float, float]]
"""Runs some steps; returns the CPU and the wall seconds they took."""
ALONE = ("in memory", "plain Pillow")
"""Ways of one thread, of which that thread alone is counted."""


# ---- the ways; they run in the train worker ----------------------------------------------------------------------


class Tree:
    """CPU seconds of all processes below one, but not of some."""

    def __init__(self, pid: int, left_out: set[int]) -> None:
        self._pid, self._left_out = pid, left_out

    def seconds(self) -> float:
        """Since each began, with the time of children that have ended."""
        ticks = 0
        for pid in {self._pid, *descendants(self._pid)} - self._left_out:
            try:
                fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")


class Files(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images as files, decoded by the project's own functions."""

    def __init__(self, folder: str) -> None:
        self._paths = sorted(map(str, Path(folder).iterdir()))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path = Path(self._paths[index])
        sample = Sample(0, path.stem, path.read_bytes(), None)
        views = empty_views([sample], recipe(), lambda shape, dtype: torch.empty(shape, dtype=dtype))
        fill(sample, recipe(), views, 0)
        return views.image[0], views.valid[0]


def recipe() -> ViewRecipe:
    """Weak views alone: strong ones cost each way the same."""
    return ViewRecipe(CONFIG.data, CONFIG.seed, 0)


def in_memory(root: str) -> list[list[Sample]]:
    """The first steps' samples, held as bytes: enough of them that caches do not matter."""
    dataset = open_dataset(root)
    split = load_split(dataset, "full")
    lanes = CONFIG.optim.batch_unlabeled
    labeled = LanePlan(select_images(dataset, split.labeled, LABELED), 1, CONFIG.seed, "labeled")
    unlabeled = LanePlan(select_groups(dataset, split.unlabeled), lanes, CONFIG.seed)
    sides = [SampleStream(plan, range(plan.lanes), 0, read_inline, None, Patience()) for plan in (labeled, unlabeled)]
    return list(itertools.islice(itertools.chain.from_iterable(zip(*sides, strict=True)), 2 * 64))


def decode_path(lots: list[list[Sample]]) -> Way:
    """`fill`, sample by sample, into the same memory."""
    views = [empty_views(lot, recipe(), lambda shape, dtype: torch.empty(shape, dtype=dtype)) for lot in lots[:2]]

    def run(lot: int) -> None:
        for place, sample in enumerate(lots[lot % len(lots)]):
            assert not fill(sample, recipe(), views[lot % 2], place).problem

    return single(run)


def plain_pillow(lots: list[list[Sample]]) -> Way:
    """What one writes first: decode, resize, crop, each with Pillow."""
    height, width = CONFIG.data.crop
    out = np.empty((3, height, width), np.uint8)

    def cut(data: bytes | memoryview, scale: float, mode: str, method: Image.Resampling) -> np.ndarray:
        picture = Image.open(io.BytesIO(data)).convert(mode)
        picture = picture.resize((round(WIDTH * scale), round(HEIGHT * scale)), method)
        return np.array(picture.crop((0, 0, min(width, picture.width), min(height, picture.height))))

    def run(lot: int) -> None:
        for sample in lots[lot % len(lots)]:
            rng = generator(CONFIG.seed, sample.epoch, sample.id, "unlabeled" if sample.mask is None else "labeled")
            scale = rng.uniform(*CONFIG.data.scale)
            pixels = cut(sample.image, scale, "RGB", Image.Resampling.BILINEAR)
            out[:, : pixels.shape[0], : pixels.shape[1]] = pixels.transpose(2, 0, 1)
            if sample.mask is not None:
                cut(sample.mask, scale, "L", Image.Resampling.NEAREST)

    return single(run)


def single(decode: Callable[[int], None]) -> Way:
    """A step is two lots, the labeled one and the unlabeled one; this thread alone counts."""

    def run(steps: int) -> tuple[float, float]:
        began, wall = time.thread_time(), time.perf_counter()
        for lot in range(2 * steps):
            decode(lot)
        return time.thread_time() - began, time.perf_counter() - wall

    return run


def streamed(batches: Iterator[Any], tree: Tree) -> Way:
    """Batches taken as fast as they come; the whole tree counts."""

    def run(steps: int) -> tuple[float, float]:
        for _ in range(WARM_STEPS):
            next(batches)
        began, wall = tree.seconds(), time.perf_counter()
        for _ in range(steps):
            next(batches)
        return tree.seconds() - began, time.perf_counter() - wall

    return run


def opened(root: str, threads: int) -> Loader:
    """The project's loader on the dataset at `root`."""
    dataset = open_dataset(root)
    split = load_split(dataset, "full")
    spec = ViewSpec(unlabeled=True)
    return Loader(CONFIG, dataset, split, spec, rank=0, world=1, start=0, threads=threads, reader=read_ray)


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs in the train worker: CPU and wall seconds of every way and round, and the idle tree's share of a core."""
    torch.set_num_threads(1)
    tree = Tree(settings["driver"], set(settings["left_out"]))
    files = DataLoader(
        Files(settings["files"]), IMAGES, shuffle=True, num_workers=2, persistent_workers=True, prefetch_factor=4,
        multiprocessing_context="forkserver",
    )  # fmt: skip
    loaders = [opened(root, settings["threads"]) for root in settings["roots"]]
    lots = in_memory(settings["roots"][0])
    ways: dict[str, Way] = {"in memory": decode_path(lots), "plain Pillow": plain_pillow(lots)}
    ways |= {
        name: streamed(iter(each), tree) for name, each in zip(("Parquet, disk", "Parquet, S3"), loaders, strict=True)
    }
    ways["DataLoader"] = streamed(endless(files), tree)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    idle = []
    for round_ in range(settings["rounds"] + 1):  # the first one warms up
        for name, run in ways.items():
            time.sleep(SETTLE_SECONDS)
            began, wall = tree.seconds(), time.perf_counter()
            time.sleep(SETTLE_SECONDS)
            idle.append((tree.seconds() - began) / (time.perf_counter() - wall))
            spent = run(settings["steps"] if round_ else WARM_STEPS)
            if round_:
                seconds[name].append(spent)
    for loader in loaders:
        loader.close()
    return {"seconds": seconds, "idle": statistics.median(idle)}


# ---- the command -------------------------------------------------------------------------------------------------


def report(found: dict[str, Any], steps: int) -> None:
    """One line per way; ratios are medians over the rounds, of images per CPU-second to the first way's."""
    images, idle = steps * IMAGES, found["idle"]
    print(f"idle tree: {idle:.1%} of a core")
    print(f"{'':14} {'img/CPU-s':>10} {'ratio':>7} {'net':>7} {'img/s':>7}")
    base = [spent for spent, _ in found["seconds"]["in memory"]]
    for name, rounds in found["seconds"].items():
        nets = [spent - (0.0 if name in ALONE else idle * wall) for spent, wall in rounds]
        rate = statistics.median(images / spent for spent, _ in rounds)
        ratio = statistics.median(own / spent for own, (spent, _) in zip(base, rounds, strict=True))
        net = statistics.median(own / spent for own, spent in zip(base, nets, strict=True))
        speed = statistics.median(images / wall for _, wall in rounds)
        print(f"{name:14} {rate:10.0f} {ratio:7.2f} {net:7.2f} {speed:7.0f}", flush=True)


def main() -> None:
    """Makes the images, runs every way in a train worker, prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096, help="unlabeled images")
    parser.add_argument("--steps", type=int, default=264, help="steps of a round, 16 images each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="decoding threads of the loader")
    arguments = parser.parse_args()
    # before Ray starts its processes
    os.environ.update(OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=str(Path(__file__).parents[1]))
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="ingest-") as folder, S3Server(Path(folder)) as server:
        os.environ.update(server.environment())
        left_out = descendants(os.getpid())
        roots = [str(Path(folder) / "noise"), f"{server.bucket_uri}/noise"]
        mean = make_images(arguments.images, roots, Path(folder) / "files")
        print(f"{arguments.images} images of {mean / 1e3:.0f} kB, {arguments.rounds} rounds of {arguments.steps} steps")
        print(f"{arguments.threads} decoding threads in the loader")
        import ray
        import ray.train
        from ray.train.torch import TorchTrainer

        ray.init(address="local", include_dashboard=False, object_store_memory=1_500_000_000, log_to_driver=False)
        settings = {"driver": os.getpid(), "left_out": left_out, "roots": roots, "files": str(Path(folder) / "files")}
        settings["threads"] = arguments.threads
        trainer = TorchTrainer(
            measure,
            train_loop_config={**settings, "steps": arguments.steps, "rounds": arguments.rounds},
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
            run_config=ray.train.RunConfig(storage_path=str(Path(folder) / "results")),
        )
        found: dict[str, Any] = trainer.fit().return_value  # type: ignore[assignment]
        ray.shutdown()
    report(found, arguments.steps)


if __name__ == "__main__":  # as a module, so that other processes can import what it defines
    importlib.import_module("benchmarks.ingest").main()
