"""How many workers a run gets and with what, and among which numbers it may change while it runs."""

from typing import NamedTuple

from pipeline import cluster
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.ingest.decoders import DECODE_CPUS
from pipeline.ingest.readers import READ_CPUS
from pipeline.methods import METHODS

CPUS_PER_WORKER = 0.5
"""Of a worker without a GPU, so that Ray Data keeps some."""


class Workers(NamedTuple):
    """The workers of a run."""

    counts: tuple[int, ...]
    """Numbers of workers that may run, ascending; a single one never changes."""
    cpus: float
    """Of each."""
    gpus: float
    """Of each; 0: none."""
    spare_cpus: float
    """That the cluster must keep beside them."""

    @property
    def most(self) -> int:
        """How many run when nothing is missing."""
        return self.counts[-1]

    @property
    def resources(self) -> dict[str, float]:
        """Of each, by Ray's names."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def workers_of(config: Config) -> Workers:
    """The workers of a run on the connected cluster.

    Raises:
        UserError: the asked numbers do not divide the batch, or the cluster has not so many GPUs or CPUs.
    """
    gpus = worker_gpus(config)
    counts = worker_counts(config)
    return Workers(counts, worker_cpus(config, counts[-1]), gpus, spare_cpus(config))


def allowed_counts(config: Config) -> list[int]:
    """Numbers of workers among which the batch divides; more than one need whole pairs of unlabeled images.

    Mixing swaps boxes within pairs: cutting one would change what is trained.
    """
    optim = config.optim
    pairs = optim.batch_unlabeled / 2 if METHODS[config.method].views.unlabeled else optim.batch_labeled
    shared = [n for n in range(2, optim.batch_labeled + 1) if optim.batch_labeled % n == 0 and pairs % n == 0]
    return [1, *shared]


def worker_gpus(config: Config) -> float:
    """GPUs of each worker: none on a cluster that has none and cannot get any."""
    return config.scaling.gpus_per_worker if cluster.capacity()[1] else 0.0


def worker_counts(config: Config) -> tuple[int, ...]:
    """Numbers of workers that share the global batch equally, ascending.

    Raises:
        UserError: the asked numbers do not divide the batch, or the cluster has not so many GPUs.
    """
    allowed, share = allowed_counts(config), worker_gpus(config)
    if config.scaling.workers == "auto":
        return (max(n for n in allowed if n <= _natural_limit(share)),)
    fewest, most = config.scaling.limits()
    counts = tuple(n for n in allowed if fewest <= n <= most)
    if not counts:
        raise UserError(
            f"scaling.workers {config.scaling.workers} does not share the batch equally (unlabeled images in pairs)"
            f"; choose from {', '.join(map(str, allowed))}"
        )
    gpus = cluster.capacity()[1]
    if share and counts[0] * share > gpus:
        raise UserError(f"scaling.workers {config.scaling.workers}: the cluster has {gpus:g} GPUs")
    return counts


def _natural_limit(share: float) -> int:
    """Most workers that nobody asked for: one per GPU that is up, else two.

    Raises:
        UserError: GPUs will come when they are asked for, but how many is a matter of money.
    """
    cpus, gpus = cluster.cpus_and_gpus()
    if share and not gpus:
        raise UserError(
            f"the cluster has no GPU yet and can get {cluster.capacity()[1]:g}: say how many, as --scaling.workers 8"
        )
    if share:
        return 1 if share < 1 else max(1, int(gpus // share))
    return min(2, max(1, int(cpus)))


def spare_cpus(config: Config) -> float:
    """CPUs that a run needs beside its workers: for reading through Ray Data and for decoding tasks."""
    reading = READ_CPUS if METHODS[config.method].views.unlabeled else 0.0
    return reading + (DECODE_CPUS if config.run.decode == "cluster" else 0.0)


def worker_cpus(config: Config, workers: int) -> float:
    """CPUs to reserve per worker, so that some are left for reading through Ray Data and for decoding tasks.

    Raises:
        UserError: none would be left: the unlabeled stream would wait for ever.
    """
    cpus, spare = cluster.capacity()[0], spare_cpus(config)
    room = (cpus - spare) / workers
    wanted = config.scaling.cpus_per_worker or (min(4.0, room) if worker_gpus(config) else CPUS_PER_WORKER)
    if wanted > room or wanted <= 0:
        raise UserError(
            f"{workers} workers with {wanted:g} CPUs each leave less than {spare:g} for reading "
            f"on a cluster of {cpus:g} CPUs: lower scaling.workers or scaling.cpus_per_worker"
        )
    return wanted
