"""A Ray cluster on hosts of its own: a head without work, workers, an S3 server, and a client that submits."""

import itertools
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cluster.site import Site
from tests.hosts import Host

TRAIN_WORKER = "RayTrainWorker"
MEMORY = "--object-store-memory=150000000"
CPUS = 2
"""Of a worker host. A train worker takes 1.5, so that no two of a run fit on one, and some is left for reading."""
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_worker_niceness": "0",
}
"""A lost host is noticed after seconds, not half a minute; whatever else the machine does takes no precedence."""


class Fleet(Site):
    """A site with head and workers."""

    def __init__(self, folder: Path, workers: int = 3) -> None:
        self.token = secrets.token_hex(32)
        super().__init__(folder, {**QUICK, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token})
        self._count = workers
        self._numbers = itertools.count(1)
        self.workers: list[Host] = []

    def start(self) -> None:
        """Starts the cluster, too."""
        super().start()
        self.start_head()
        self.start_workers(self._count)

    def start_head(self) -> None:
        """A new head; the workers of the one before are lost."""
        self.head = self.host("head")
        self.jobs = f"http://{self.head.address}:8265"
        self._ray(self.head, "--head", "--port=6379", f"--dashboard-host={self.head.address}", "--num-cpus=0")

    def start_workers(self, count: int) -> list[Host]:
        """Adds new hosts, at the same time."""
        hosts = [self.host(f"worker-{next(self._numbers)}") for _ in range(count)]
        self.workers += hosts
        join = (f"--address={self.head.address}:6379", f"--num-cpus={CPUS}")
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda host: self._ray(host, *join), hosts))
        return hosts

    def replace_lost(self) -> None:
        """Takes the hosts without a node off, and fills up with new ones."""
        for host in self.workers:
            if not host.find("raylet/raylet"):
                host.power_off()
        self.workers = [host for host in self.workers if not host.off]
        self.start_workers(self._count - len(self.workers))

    @property
    def training(self) -> list[Host]:
        """The hosts on which train workers are."""
        return [host for host in self.workers if host.find(TRAIN_WORKER)]

    def _ray(self, host: Host, *flags: str) -> None:
        """`ray start`; a loaded machine may miss Ray's 30 s for it."""
        command = ("ray", "start", f"--node-ip-address={host.address}", MEMORY, "--disable-usage-stats", *flags)
        for last in (False, True):
            if host.run(*command, check=last, seconds=180).returncode == 0:
                return
            host.run("ray", "stop", "--force", check=False)
