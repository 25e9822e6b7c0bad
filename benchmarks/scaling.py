"""What a U2PL step costs on many GPUs, and what breaks first: the model behind docs/scaling.md.

    python benchmarks/scaling.py [--step_seconds S] [--sustained_tflops 30] [--network 5] [--latency_us 15] ...

Counted on the networks of the voc_classic preset, without running them: floating-point operations of a step, gradient
and checkpoint bytes, synchronised layers. Measured elsewhere: decoded images per core (docs/ingest.md). Assumed: what
the flags say; `--step_seconds` puts a measured time in the place of the counted one.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installation, like the jobs

from pipeline.config import cli
from pipeline.config.methods import OPTIONS
from pipeline.config.options import U2PLOptions
from pipeline.config.schema import Config
from pipeline.models.network import build_model

CLASSES = 21
WORLDS = (1, 8, 64, 512)
SPEEDS = (30.0, 100.0, 250.0)
"""TFLOP/s of a GPU that `speed_table` compares."""
LINKS = ((5.0, 15.0), (300.0, 3.0))
"""GB/s and microseconds a message: a network of 40 Gbit/s, NVLink within one node."""
POOLS = (10**6, 10**7, 10**8, 10**9)
PASSES = 9
"""Forward passes' worth of work per labeled and unlabeled pair: student forward and backward on both (6), teacher on
the clean unlabeled image (1) and on both (2)."""
SHARD_IMAGES = 512
TASK_IMAGES = 448
"""Of 55 kB in the 24 MB that one read task takes."""


@dataclass(frozen=True)
class Machine:
    """What is assumed of the machines."""

    sustained_tflops: float
    network: float
    latency_us: float
    cores_per_gpu: float
    images_per_core: float
    store: float
    hours_between_losses: float


@dataclass(frozen=True)
class Counted:
    """What one pair of images and one step come to."""

    forward_flops: float
    gradient_bytes: float
    state_bytes: float
    norms: int
    options: U2PLOptions


def count(config: Config) -> Counted:
    """Counts on meta tensors: nothing is computed."""
    options = config.options_of(U2PLOptions)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_model(config.model, CLASSES, features=True)
        model(torch.empty(1, 3, *config.data.crop))
    parameters = sum(each.numel() for each in model.parameters())
    keys = options.queue_background + options.queue * (CLASSES - 1)
    return Counted(
        forward_flops=float(counter.get_total_flops()),
        gradient_bytes=4.0 * parameters,
        state_bytes=4.0 * (3 * parameters + keys * config.model.feature_dim),  # student, teacher, momentum; bank
        norms=sum(isinstance(each, nn.BatchNorm2d) for each in model.modules()),
        options=options,
    )


def ring_seconds(size: float, world: int, machine: Machine) -> float:
    """An all-reduce in a ring: 2 (W-1) messages of size/W, each with a latency."""
    return 2 * (world - 1) * (size / world / (machine.network * 1e9) + machine.latency_us * 1e-6)


def tree_seconds(world: int, machine: Machine) -> float:
    """A collective of a few numbers in a tree."""
    return 2 * math.ceil(math.log2(world)) * machine.latency_us * 1e-6 if world > 1 else 0.0


def bank_bytes(world: int, keys: int, feature_dim: int = 256, key_bytes: int = 4) -> float:
    """What a rank receives in a step to keep its memory banks equal to the others'."""
    return float((world - 1) * CLASSES * keys * feature_dim * key_bytes)


def step_parts(world: int, pairs: int, compute: float, counted: Counted, machine: Machine, keys: int) -> list[float]:
    """Seconds of a step: compute, exposed gradients, batch norm, bank, exposed ingest.

    Gradients are sent while the backward pass runs, two thirds of the student's part; what does not fit is exposed.
    """
    backward = compute * 4 / PASSES
    gradients = max(0.0, ring_seconds(counted.gradient_bytes, world, machine) - backward)
    # each layer: statistics forward, sums backward; student and the teacher's pass in training mode
    norms = 3 * counted.norms * tree_seconds(world, machine)
    bank = bank_bytes(world, keys) / (machine.network * 1e9)
    cores = machine.cores_per_gpu - 1
    ingest = max(0.0, 2 * pairs / (machine.images_per_core * cores) - compute)
    return [compute, gradients, norms, bank, ingest]


def waste(nodes: int, readers: int, state_bytes: float, machine: Machine) -> tuple[float, float]:
    """The best interval of checkpoints in seconds and the share of time that lost nodes cost (Young, Daly).

    A checkpoint blocks while it is serialised, at 1 GB/s; a restart takes 100 s, and `readers` a node read the state.
    """
    between = machine.hours_between_losses * 3600 / nodes
    blocked = state_bytes / 1e9
    restart = 100 + readers * state_bytes / (machine.store * 1e9)
    interval = math.sqrt(2 * blocked * between)
    return interval, blocked / interval + interval / (2 * between) + restart / between


def efficiency_table(pairs: int, compute: float, counted: Counted, machine: Machine, gpus_per_node: int) -> None:
    """Prints a step on growing clusters, with the bank's traffic capped and not."""
    print("\n  GPUs  keys  compute  gradients  norms   bank  ingest  efficiency  checkpoint every  lost to nodes")
    options = counted.options
    for world in WORLDS:
        for keys in sorted({options.keys, options.keys_of(world)}, reverse=True):
            parts = step_parts(world, pairs, compute, counted, machine, keys)
            interval, lost = waste(max(1, world // gpus_per_node), gpus_per_node, counted.state_bytes, machine)
            times = "  ".join(f"{1e3 * each:6.0f}" for each in parts)
            share = parts[0] / sum(parts)
            print(f"{world:6d}  {keys:4d}  {times}        {share:6.1%}           {interval:5.0f} s         {lost:6.1%}")


def speed_table(counted: Counted, machine: Machine) -> None:
    """Prints 8 GPUs of growing speed on either link, and what halved gradients and banks, and twice the images, do."""
    print(
        "\n  TFLOP/s  GB/s  us  compute  gradients  norms  bank  efficiency  bf16 gradients  and bank  and 4 + 4 images"
    )
    world, keys = 8, counted.options.keys
    halved = replace(counted, gradient_bytes=counted.gradient_bytes / 2)

    def parts(counts: Counted, link: Machine, pairs: int, bank: float) -> list[float]:
        compute = pairs * PASSES * counted.forward_flops / (link.sustained_tflops * 1e12)
        compute, gradients, norms, exchanged, _ = step_parts(world, pairs, compute, counts, link, keys)
        return [compute, gradients, norms, bank * exchanged]

    for network, latency in LINKS:
        for tflops in SPEEDS:
            link = replace(machine, sustained_tflops=tflops, network=network, latency_us=latency)
            cases = [(counted, 2, 1.0), (halved, 2, 1.0), (halved, 2, 0.5), (halved, 4, 0.5)]
            steps = [parts(counts, link, pairs, bank) for counts, pairs, bank in cases]
            times = "  ".join(f"{1e3 * each:6.0f}" for each in steps[0])
            shares = "  ".join(f"{each[0] / sum(each):8.0%}" for each in steps)
            print(f"{tflops:9.0f}  {network:4.0f}  {latency:2.0f}  {times}  {shares}")


def pool_table(compute: float, pairs: int, machine: Machine) -> None:
    """Prints what pools of growing size ask of a cluster of 64 GPUs."""
    rate = 64 * pairs / compute
    print("\n       images    shards  hours a pass  MB/s from the store  read tasks/s")
    for images in POOLS:
        hours, tasks = images / rate / 3600, rate / TASK_IMAGES
        print(f"{images:13,d}  {images // SHARD_IMAGES:8,d}  {hours:12.1f}  {rate * 0.055:19.0f}  {tasks:12.2f}")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--step_seconds", type=float, default=0.0, help="measured time of a step on one GPU (default: counted)")
    add("--pairs", type=int, default=2, help="labeled and unlabeled images of each GPU")
    add("--gpus_per_node", type=int, default=4)
    add("--sustained_tflops", type=float, default=30.0, help="of a GPU, in bf16")
    add("--network", type=float, default=5.0, help="GB/s between nodes, for all GPUs of a node together")
    add("--latency_us", type=float, default=15.0, help="of one message")
    add("--cores_per_gpu", type=float, default=12.0)
    add("--images_per_core", type=float, default=441.0, help="decoded from S3 (docs/ingest.md)")
    add("--store", type=float, default=0.2, help="GB/s to and from the store for a checkpoint")
    add("--hours_between_losses", type=float, default=20.0, help="of one node")
    args = vars(parser.parse_args())
    seconds, pairs, per_node = args.pop("step_seconds"), args.pop("pairs"), args.pop("gpus_per_node")
    machine = Machine(**args)
    config, _ = cli.parse_config(["--preset", "voc_classic", "--model.weights", "none"], "", OPTIONS)
    counted = count(config)
    compute = seconds or pairs * PASSES * counted.forward_flops / (machine.sustained_tflops * 1e12)
    print(
        f"forward pass of one image {counted.forward_flops / 1e9:.0f} GFLOP, gradients "
        f"{counted.gradient_bytes / 1e6:.0f} MB, checkpoint {counted.state_bytes / 1e6:.0f} MB, {counted.norms} batch "
        f"norms; step of {pairs} + {pairs} images a GPU: {compute:.3f} s; times below in ms"
    )
    efficiency_table(pairs, compute, counted, machine, per_node)
    speed_table(counted, machine)
    pool_table(compute, pairs, machine)


if __name__ == "__main__":
    main()
