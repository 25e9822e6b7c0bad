"""Where a Ray cluster can be: an S3 server and a client that submits jobs, on hosts of their own."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

from tests.hosts import PATH, Host, Network
from tests.jobs import SHORT
from tests.processes import wait_for
from tests.s3 import KEY, SECRET, server_command

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent.resolve()
DATA = "s3://data/shapes"
S = TypeVar("S", bound="Site")
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


class Site:
    """Storage and client; everything is off at the end of the block.

    Args:
        folder: for what the storage holds, and for logs.
        environment: beside `ENVIRONMENT`, for every command on every host.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.network = Network(folder, {**ENVIRONMENT, **environment})
        self.jobs = ""
        """Address of the job server, as the client reaches it."""

    def __enter__(self: S) -> S:
        self.network.__enter__()
        try:
            self.start()
        except BaseException:
            self.network.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.network.__exit__()

    def start(self) -> None:
        """Switches the hosts on and fills the storage."""
        (self.folder / "s3").mkdir()
        self.s3 = self.host("s3", self.folder)
        ports = [9333, 19333, 9340, 19340, 8888, 18888, 8333, 18333, 23646, 33646]
        self.s3.start(*server_command(self.folder / "s3", self.s3.address, ports), log=self.folder / "weed.log")
        self.client = self.host("client", ROOT)
        look = ("python", "-m", "tests.cluster.look")
        self._look = self.client.start(*look, cwd=str(ROOT), PYTHONPATH=str(ROOT))
        wait_for("the storage", lambda: self._ask("ready", "http://s3:8333"))
        prepare = ("python", "jobs/prepare.py", "--source", "shapes", "--out", DATA)
        self.client.run(*prepare, cwd=str(ROOT), seconds=300)

    def host(self, name: str, *visible: Path) -> Host:
        """A new host, on which the Python of the tests is installed."""
        return self.network.host(name, visible=[BIN.parent, *visible])

    def submit(self, log: Path, *command: str, **environment: str) -> "Submitted":
        """`ray job submit` on the client, from a checkout."""
        submit = ("ray", "job", "submit", "--address", self.jobs, "--working-dir", ".", "--")
        return Submitted(self.client.start(*submit, *command, log=log, cwd=str(ROOT), **environment), log)

    def train(self, log: Path, run: str, *flags: str) -> "Submitted":
        """Submits a short training by jobs/submit.py."""
        submit = ("python", "jobs/submit.py", "--address", self.jobs, "--")
        return Submitted(self.client.start(*submit, *training(run, *flags), log=log, cwd=str(ROOT)), log)

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


def training(run: str, *flags: str) -> tuple[str, ...]:
    """The job of a short training."""
    return "jobs/train.py", *SHORT, "--data", DATA, "--out", run, *flags


class Submitted:
    """A job of which the client follows the log."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self.log = process, log

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def name(self) -> str:
        """By which the cluster knows it."""
        return self.said.partition("job ")[2].split()[0]

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
