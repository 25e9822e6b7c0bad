"""A Ray cluster on hosts of its own: a head without work, workers, an S3 server, and a client that submits."""

import base64
import itertools
import json
import re
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.hosts import PATH, Host, Network
from tests.jobs import SHORT
from tests.processes import wait_for
from tests.s3 import KEY, SECRET, server_command

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent.resolve()
DATA = "s3://data/shapes"
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
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
"""A lost host is noticed after seconds, not half a minute."""
ENVIRONMENT = {
    "PATH": f"{BIN}:{PATH}",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_ENDPOINT_URL": "http://s3:8333",
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
}


class Fleet:
    """Head, workers, storage and client; everything is off at the end of the block."""

    def __init__(self, folder: Path, workers: int = 3) -> None:
        self._folder = folder
        self._count = workers
        self.token = secrets.token_hex(32)
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        self.network = Network(folder, {**ENVIRONMENT, **QUICK, **auth})
        self._numbers = itertools.count(1)
        self.workers: list[Host] = []

    def __enter__(self) -> "Fleet":
        self.network.__enter__()
        try:
            self._start()
        except BaseException:
            self.network.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.network.__exit__()

    def _start(self) -> None:
        (self._folder / "s3").mkdir()
        self.s3 = self._host("s3", self._folder)
        ports = [9333, 19333, 9340, 19340, 8888, 18888, 8333, 18333, 23646, 33646]
        self.s3.start(*server_command(self._folder / "s3", self.s3.address, ports), log=self._folder / "weed.log")
        self.client = self._host("client", ROOT)
        look = ("python", "-m", "tests.cluster.look")
        self._look = self.client.start(*look, cwd=str(ROOT), PYTHONPATH=str(ROOT))
        wait_for("the storage", lambda: self._ask("ready", "http://s3:8333"))
        self.start_head()
        self.start_workers(self._count)

    def start_head(self) -> None:
        """A new head; the workers of the one before are lost."""
        self.head = self._host("head")
        self._ray(self.head, "--head", "--port=6379", f"--dashboard-host={self.head.address}", "--num-cpus=0")

    def start_workers(self, count: int) -> list[Host]:
        """Adds new hosts, at the same time."""
        hosts = [self._host(f"worker-{next(self._numbers)}") for _ in range(count)]
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

    def _host(self, name: str, *visible: Path) -> Host:
        return self.network.host(name, visible=[BIN.parent, *visible])

    def _ray(self, host: Host, *flags: str) -> None:
        """`ray start`; a loaded machine may miss Ray's 30 s for it."""
        command = ("ray", "start", f"--node-ip-address={host.address}", MEMORY, "--disable-usage-stats", *flags)
        for last in (False, True):
            if host.run(*command, check=last, seconds=180).returncode == 0:
                return
            host.run("ray", "stop", "--force", check=False)

    def submit(self, log: Path, *command: str, **environment: str) -> "Submitted":
        """`ray job submit` on the client, from a checkout."""
        submit = ["ray", "job", "submit", "--address", f"http://{self.head.address}:8265", "--working-dir", "."]
        process = self.client.start(*submit, "--", *command, log=log, cwd=str(ROOT), **environment)
        return Submitted(process, log)

    def train(self, log: Path, run: str, *flags: str) -> "Submitted":
        """Submits a short training."""
        return self.submit(log, "python", "jobs/train.py", *SHORT, "--data", DATA, "--out", run, *flags)

    def read(self, uri: str) -> bytes | None:
        """What is in the storage."""
        found = self._ask("read", uri)
        return None if found is None else base64.b64decode(str(found))

    def files(self, uri: str) -> list[str]:
        """What is below a URI of the storage."""
        found = self._ask("list", uri)
        assert isinstance(found, list)
        return found

    def _ask(self, do: str, uri: str) -> object:
        assert self._look.stdin is not None
        assert self._look.stdout is not None
        print(json.dumps({"do": do, "uri": uri}), file=self._look.stdin, flush=True)
        return json.loads(self._look.stdout.readline())


class Submitted:
    """A job of which the client follows the log."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self.log = process, log

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    @property
    def step(self) -> int:
        """The last one that the log tells of."""
        return max(map(int, re.findall(r"^step +(\d+)/", self.said, re.MULTILINE)), default=0)

    def wait(self, seconds: float = 300) -> int:
        """Its exit code."""
        return self._process.wait(seconds)
