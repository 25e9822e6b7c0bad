"""What a larger unlabeled pool costs: start and memory, of generated pools with those parts alone that are read.

    python benchmarks/ingest_scale.py [--rounds 5] [--steps 120]

The first table is about the start, for pools of a thousand to a million shards of 512 images: seconds from opening
the pool to the first batch (median of rounds in which all take turns, in one train worker; Ray's own processes run
already), peak memory of a train worker of its own, and what the driver allocates to open the pool and to share out the
lanes. The second one is about going on: peak memory of a train worker and the object store together over the same
number of steps from a pool of 1,000 and of 100,000 images. Images are 500x375 JPEGs, views 513x513, one labeled and 15
unlabeled ones a step.
"""

import argparse
import importlib
import itertools
import os
import secrets
import statistics
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installation, like the jobs

from pipeline.config.methods import ViewSpec
from pipeline.config.schema import Config, DataConfig, OptimConfig
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.datasets.shapes import prepare_shapes
from pipeline.ingest.loader import Loader
from pipeline.ingest.order import Mixture, open_source, share_lanes
from pipeline.ingest.read import read_ray
from tests.pools import ROWS_PER_SHARD, link_parts, write_part, write_pool

SHARDS = (10**3, 10**4, 10**5, 10**6)
ROWS = (1_000, 100_000)
CONFIG = Config(data=DataConfig(), optim=OptimConfig(batch_labeled=1, batch_unlabeled=15))
LANES = CONFIG.optim.batch_unlabeled
LOOKS_PER_SECOND = 50
AHEAD = 200
"""Row groups that are made for more than the steps need: what is read ahead."""


def make_pool(root: Path, rows: int, part: Path, size: int, steps: int) -> str:
    """A pool with the parts for so many steps."""
    uri = write_pool(root, rows, size)
    units = Mixture([open_source(uri)], LANES, CONFIG.seed).units(range(LANES), 0)
    needed = AHEAD + steps * LANES // 64
    link_parts(part, (unit.group for unit in itertools.islice(units, needed)))
    return uri


def opened(root: str, pool: str) -> Loader:
    """The project's loader, of the pool alone on the unlabeled side."""
    dataset = open_dataset(root)
    spec = ViewSpec(unlabeled=True)
    return Loader(
        CONFIG, dataset, load_split(dataset, "1_16"), spec, rank=0, world=1, start=0, threads=1, reader=read_ray,
        sources=[open_source(pool)],
    )  # fmt: skip


# ---- in the train worker -----------------------------------------------------------------------------------------


def start(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the first batch of each pool, in turn, and the process's peak memory."""
    torch.set_num_threads(1)
    seconds: list[list[float]] = [[] for _ in settings["pools"]]
    for _ in range(settings["rounds"]):
        for pool, found in zip(settings["pools"], seconds, strict=True):
            began = time.perf_counter()
            loader = opened(settings["dataset"], pool)
            next(iter(loader))
            found.append(time.perf_counter() - began)
            loader.close()
    return {"seconds": list(map(statistics.median, seconds)), "memory": memory("VmHWM")}


def go_on(settings: dict[str, Any]) -> dict[str, Any]:
    """Peak of this process's own memory and the object store's together."""
    torch.set_num_threads(1)
    peak, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(1 / LOOKS_PER_SECOND):
            peak[0] = max(peak[0], memory("RssAnon") + object_store())

    watcher = threading.Thread(target=look)
    watcher.start()
    loader = opened(settings["dataset"], settings["pool"])
    for _ in itertools.islice(loader, settings["steps"]):
        pass
    loader.close()
    ended.set()
    watcher.join()
    return {"memory": peak[0]}


def memory(kind: str) -> float:
    """A figure of this process, MB."""
    lines = (Path("/proc") / str(os.getpid()) / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1e3


def object_store() -> float:
    """What the objects of this node take, MB; Ray tells nobody but its own tools."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return get_memory_info_reply(state).store_stats.object_store_bytes_used / 1e6


# ---- the command -------------------------------------------------------------------------------------------------


def in_worker(work: Any, settings: dict[str, Any], results: Path) -> dict[str, Any]:
    """Runs in a train worker of its own."""
    import ray.train
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        work,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(storage_path=str(results)),
    )
    found: dict[str, Any] = trainer.fit().return_value  # type: ignore[assignment]
    return found


def driver(pool: str) -> float:
    """Peak of what opening a pool allocates, kB."""
    tracemalloc.start()
    share_lanes([open_source(pool)], LANES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e3


def run(folder: Path, rounds: int, steps: int) -> None:
    """Makes the pools, measures each, prints both tables."""
    part, results, told = folder / "part.parquet", folder / "results", {"dataset": str(folder / "shapes")}
    size = write_part(part, 375, 500)
    prepare_shapes(told["dataset"])
    pools = [make_pool(folder / f"start-{n}", n * ROWS_PER_SHARD, part, size, 0) for n in SHARDS]
    in_worker(start, {**told, "pools": pools, "rounds": 1}, results)  # what is started on the way counts for nothing
    driver(pools[0])
    seconds = in_worker(start, {**told, "pools": pools, "rounds": rounds}, results)["seconds"]
    print(f"{'shards':>9} {'first batch, s':>15} {'ratio':>6} {'worker, MB':>11} {'ratio':>6} {'driver, kB':>11} ratio")
    base: tuple[float, ...] = ()
    for shards, pool, own in zip(SHARDS, pools, seconds, strict=True):
        row = (own, in_worker(start, {**told, "pools": [pool], "rounds": 1}, results)["memory"], driver(pool))
        base = base or row
        (s, s_ratio), (w, w_ratio), (d, d_ratio) = (
            (value, value / first) for value, first in zip(row, base, strict=True)
        )
        print(f"{shards:>9} {s:15.2f} {s_ratio:6.2f} {w:11.0f} {w_ratio:6.2f} {d:11.0f} {d_ratio:5.2f}", flush=True)
    print(f"\n{'images':>9} {'worker + object store, MB':>26} {'ratio':>6}")
    peaks: list[float] = []
    for rows in ROWS:
        settings = {**told, "pool": make_pool(folder / f"{rows}", rows, part, size, steps), "steps": steps}
        peaks.append(statistics.median(in_worker(go_on, settings, results)["memory"] for _ in range(rounds)))
        print(f"{rows:>9} {peaks[-1]:26.0f} {peaks[-1] / peaks[0]:6.2f}", flush=True)


def main() -> None:
    """Starts Ray and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120, help="steps of the second table")
    arguments = parser.parse_args()
    # before Ray starts its processes
    os.environ.update(OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=str(Path(__file__).parents[1]))
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        ray.init(address="local", include_dashboard=False, object_store_memory=1_000_000_000, log_to_driver=False)
        run(Path(folder), arguments.rounds, arguments.steps)
        ray.shutdown()


if __name__ == "__main__":  # as a module, so that other processes can import what it defines
    importlib.import_module("benchmarks.ingest_scale").main()
