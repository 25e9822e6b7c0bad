"""How many workers a run gets and with what, and among which numbers it may change while it runs."""

from collections.abc import Sequence

from pipeline.cluster import nodes
from pipeline.cluster.nodes import Machine, Workers, gpu_slots, places
from pipeline.config.methods import SPECS
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.ingest.read import DECODE_CPUS, READ_CPUS

CPUS_PER_WORKER = 0.5
"""CPUs of a worker without a GPU: half of one, so that Ray Data has the rest."""


def workers_of(config: Config) -> Workers:
    """The workers of a run on the connected cluster; on one that starts nodes when asked for, once they are there.

    Raises:
        UserError: the asked numbers do not divide the batch, or the cluster has not so many GPUs or CPUs.
    """
    counts, spare = worker_counts(config), spare_cpus(config)
    up = _nodes(config, counts[0])
    if not sum(machine.cpus for machine in up):
        raise UserError("no node of the cluster has CPUs for work yet: wait until `ray status` shows some")
    gpus = worker_gpus(config, up)
    if gpus and counts[0] > gpu_slots(up, gpus):
        more = " and cannot get so many (on CPUs: --scaling.gpus_per_worker 0)" if nodes.grows() else ""
        raise UserError(f"scaling.workers {config.scaling.workers}: the cluster has {gpu_slots(up, 1)} GPUs{more}")
    workers = Workers(counts, worker_cpus(config, up, gpus), gpus, spare)
    if counts[0] > places(up, workers):
        raise UserError(
            f"{counts[0]} workers with {workers.cpus:g} CPUs each leave no {spare:g} for reading on a cluster of "
            f"{sum(machine.cpus for machine in up):g} CPUs: lower scaling.workers or scaling.cpus_per_worker"
        )
    return workers


def _nodes(config: Config, fewest: int) -> list[Machine]:
    """The nodes that are up; a cluster that grows is first brought to hold so many workers, if it can.

    Only then is it known what its nodes have: Ray does not tell of those that it could start.
    """
    up, scaling, spare = nodes.machines(), config.scaling, spare_cpus(config)
    if not nodes.grows():
        return up
    if scaling.gpus_per_worker:
        held, bundles = gpu_slots(up, scaling.gpus_per_worker), [{"GPU": scaling.gpus_per_worker}] * fewest
    else:
        cpus = scaling.cpus_per_worker or CPUS_PER_WORKER
        held = places(up, Workers((fewest,), cpus, 0.0, spare))
        bundles = [{"CPU": cpus}] * fewest + [{"CPU": spare}] * bool(spare)
    if held < fewest:
        asked = " and ".join(f"{sum(each.get(name, 0) for each in bundles):g} {name}s" for name in bundles[0])
        print(f"waiting for nodes: {fewest} workers need {asked}", flush=True)
        nodes.start_nodes(bundles)
    return nodes.machines()


def allowed_counts(config: Config) -> list[int]:
    """Numbers of workers that divide the batch, so that each has as many images for every micro-batch.

    With more than one, each needs whole pairs of unlabeled images. Mixing swaps boxes within pairs, so a pair must not
    be split over workers; over micro-batches it may, as it is mixed before.
    """
    optim, both = config.optim, SPECS[config.method].views.unlabeled
    sides = (optim.batch_labeled, optim.batch_unlabeled) if both else (optim.batch_labeled,)
    pairs = optim.batch_unlabeled / 2 if both else optim.batch_labeled

    def share(n: int) -> bool:
        return all(side % (n * optim.accumulate) == 0 for side in sides) and (n == 1 or pairs % n == 0)

    return [n for n in range(1, optim.batch_labeled + 1) if share(n)]


def worker_gpus(config: Config, up: Sequence[Machine]) -> float:
    """GPUs of each worker: 0 on a cluster that has none and starts no nodes."""
    return config.scaling.gpus_per_worker if nodes.grows() or any(machine.gpus for machine in up) else 0.0


def worker_counts(config: Config) -> tuple[int, ...]:
    """Numbers of workers that share the global batch equally, ascending.

    Raises:
        UserError: the asked numbers do not divide the batch, or `auto` on a cluster without GPUs that may start nodes.
    """
    allowed = allowed_counts(config)
    if config.scaling.workers == "auto":
        limit = _natural_limit(config)
        return (max(n for n in allowed if n <= limit),)
    fewest, most = config.scaling.limits()
    counts = tuple(n for n in allowed if fewest <= n <= most)
    if not counts:
        raise UserError(
            f"scaling.workers {config.scaling.workers} does not share the batch equally (unlabeled images in pairs"
            f"{f', of each {config.optim.accumulate} micro-batches' if config.optim.accumulate > 1 else ''}); "
            f"choose from {', '.join(map(str, allowed))}"
        )
    return counts


def _natural_limit(config: Config) -> int:
    """The number of workers of `auto`: one per GPU that is up, else two.

    Raises:
        UserError: the cluster starts nodes on request, and how many must be said, as they cost money.
    """
    up = nodes.machines()
    share = worker_gpus(config, up)
    if not share:
        return min(2, max(1, int(sum(machine.cpus for machine in up))))
    slots = gpu_slots(up, share)
    if not slots:
        raise UserError(
            "the cluster has no GPU yet and starts nodes when they are asked for: say how many, as --scaling.workers 8 "
            "(on CPUs: --scaling.gpus_per_worker 0 as well)"
        )
    return slots if share == 1 else 1


def spare_cpus(config: Config) -> float:
    """CPUs that a run needs beside its workers: for reading through Ray Data and for decoding tasks."""
    reading = READ_CPUS if SPECS[config.method].views.unlabeled else 0.0
    return reading + (DECODE_CPUS if config.run.decode == "cluster" else 0.0)


def worker_cpus(config: Config, up: Sequence[Machine], share: float) -> float:
    """CPUs to reserve per worker.

    Beside a GPU at most 4, and at most what falls to that GPU on the node with the fewest, less what the run needs
    beside its workers: so every GPU can have a worker of this run or of another one.

    Args:
        config: of the run.
        up: the nodes that are up.
        share: GPUs of each worker.

    Raises:
        UserError: none would be left.
    """
    wanted = config.scaling.cpus_per_worker
    if not share:
        return wanted or CPUS_PER_WORKER
    able = [node for node in up if node.gpus]
    fair = min(node.cpus / max(1, gpu_slots([node], share)) for node in able) - spare_cpus(config)
    if not wanted and fair <= 0:
        raise UserError(f"the nodes have too few CPUs for their GPUs: {fair + spare_cpus(config):g} for each worker")
    return wanted or min(4.0, fair)
