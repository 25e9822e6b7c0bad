"""A real S3 server for tests: SeaweedFS from its PyPI wheel."""

import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pyarrow.fs as pafs

KEY, SECRET = "trainer-key", "trainer-secret"
READER_KEY, READER_SECRET = "reader-key", "reader-secret"


class S3Server:
    """`weed mini` on free ports with a bucket `data`; missing buckets are not created by a write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: list[int] = []
        self.endpoint = ""
        self.bucket_uri = "s3://data"

    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def __enter__(self) -> "S3Server":
        for _ in range(5):  # another run of the tests may take a port between the look and the start
            self.start(free_ports(10))
            if self._wait():
                return self
            self.stop()
        raise RuntimeError(f"SeaweedFS did not start; its log is {self._folder / 'weed.log'}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, ports: list[int]) -> None:
        """Starts the server process."""
        self._ports = ports
        self.endpoint = f"http://127.0.0.1:{ports[6]}"
        log = (self._folder / "weed.log").open("ab")
        self._process = subprocess.Popen(server_command(self._folder, "127.0.0.1", ports), stdout=log, stderr=log)

    def _wait(self) -> bool:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            if is_ready(self.endpoint):
                return True
            time.sleep(0.1)
        return False

    def kill(self) -> None:
        """SIGKILL, as a lost machine would look; what was written stays."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(30)

    def restart(self) -> None:
        """Starts it again on the same ports and data; returns at once."""
        self.start(self._ports)

    def bring_back(self) -> None:
        """Starts it again as `restart` does, until it answers: one of its ports may be taken for a moment."""
        for _ in range(30):
            self.restart()
            if self._wait():
                return
            self.stop()
        raise RuntimeError(f"SeaweedFS did not come back; its log is {self._folder / 'weed.log'}")

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None


def server_command(folder: Path, address: str, ports: list[int]) -> list[str]:
    """The command line of a server that keeps its data in `folder` and listens at `address`; S3 is at the 7th port."""
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [_identity("trainer", KEY, SECRET), _reader()]}))
    config.chmod(0o600)
    names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"]
    names += ["s3.port", "s3.port.grpc", "admin.port", "admin.port.grpc"]
    flags = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    flags += [f"-ip={address}", f"-ip.bind={address}", f"-dir={folder}", "-master.telemetry=false"]
    flags += [f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false"]
    flags += ["-s3.autoCreateBucket=false", "-bucket=data"]
    return [_weed(), "-logtostderr=true", "mini", *flags]


def is_ready(endpoint: str) -> bool:
    """Whether a signed write and read succeed, in buckets made for that; the health page answers too early."""
    client = pafs.S3FileSystem(
        endpoint_override=endpoint.removeprefix("http://"), scheme="http", access_key=KEY, secret_key=SECRET,
        region="us-east-1", allow_bucket_creation=True, connect_timeout=2, request_timeout=5,
    )  # fmt: skip
    with contextlib.suppress(OSError):
        client.create_dir("data")
        client.create_dir("runs")
        with client.open_output_stream("data/.probe") as stream:
            stream.write(b"ready")
        with client.open_input_stream("data/.probe") as stream:
            return stream.read() == b"ready"
    return False


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, each given once in this process.

    They lie above those of Ray's workers and below those that the kernel gives to clients: no connection of another
    test takes one before the server that it is for has started. Processes that run tests side by side have their own.
    """
    found: list[int] = []
    while len(found) < count:
        port = next(_ports)
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            found.append(port)
    return found


def _every_port() -> Iterator[int]:
    """Those of this process, from one that another run of the tests beside this one has hardly begun with."""
    mine = _FIRST_PORT + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _SHARES * _PORTS
    begin = random.SystemRandom().randrange(_PORTS)
    return itertools.cycle(mine + (begin + number) % _PORTS for number in range(_PORTS))


_FIRST_PORT, _SHARES, _PORTS = 20_000, 4, 3_000
_ports = _every_port()


def _identity(name: str, key: str, secret: str) -> dict[str, object]:
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}


def _reader() -> dict[str, object]:
    identity = _identity("reader", READER_KEY, READER_SECRET)
    return {**identity, "actions": ["Read:data", "List:data"]}


def _weed() -> str:
    beside = Path(sys.executable).parent.resolve() / "weed"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("weed")
    if not found:
        raise RuntimeError("no `weed`: install the package with its dev extra (make test does)")
    return found
