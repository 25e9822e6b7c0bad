"""Nodes of a Ray cluster, all on this machine: the commands that start them, and a head with a token of its own."""

import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tests.processes import descendants, kill, named, wait_for
from tests.s3 import free_ports

_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")


_LIST = "import ray; ray.init(logging_level='ERROR'); print([n['NodeID'] for n in ray.nodes() if n['Alive']])"


def nodes(env: dict[str, str], count: int) -> list[str]:
    """Ids of the nodes of the cluster that RAY_ADDRESS names, once there are `count` of them."""
    said = subprocess.run([sys.executable, "-c", _LIST], env=env, capture_output=True, text=True).stdout
    found = said.replace("'", "").strip("[]\n").split(", ")
    return found if said and len(found) == count else []


def head_command(gcs: int, *, cpus: float, dashboard: int | None = None) -> list[str]:
    """A head on port `gcs`, with a job server on port `dashboard`."""
    client, *_ = free_ports(1)
    shown = ["--include-dashboard=false"] if dashboard is None else [f"--dashboard-port={dashboard}"]
    return [*_started(cpus), "--head", f"--port={gcs}", f"--ray-client-server-port={client}", *shown]


def node_command(gcs: int, *, cpus: float) -> list[str]:
    """A node that joins the head on port `gcs`."""
    return [*_started(cpus), f"--address=127.0.0.1:{gcs}"]


def _started(cpus: float) -> list[str]:
    command = ["ray", "start", "--block", f"--num-cpus={cpus:g}", "--node-ip-address=127.0.0.1"]
    command += ["--object-store-memory=200000000", "--disable-usage-stats"]
    return command + [f"--{name}={port}" for name, port in zip(_PORTS, free_ports(len(_PORTS)), strict=True)]


class Head:
    """A head of its own, under a private home directory; ended with all that it started at the end of the block."""

    def __init__(self, folder: str, *, cpus: float = 1, **more: str) -> None:
        """Args: folder: a short path, as it holds sockets; more: variables that its processes have besides."""
        self.folder = Path(folder)
        self.home = self.folder / "home"
        (self.home / ".ray").mkdir(parents=True)
        token = self.home / ".ray" / "auth_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        gcs, dashboard = free_ports(2)
        self.gcs, self.url = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        self._cpus, self._more = cpus, more
        self._processes: list[subprocess.Popen] = []

    @property
    def environment(self) -> dict[str, str]:
        """What a client of this cluster has set."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"HOME": str(self.home), "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(self.folder), "PATH": path}
        return {**os.environ, **own}

    def __enter__(self) -> "Head":
        port, dashboard = self.gcs.rpartition(":")[2], self.url.rpartition(":")[2]
        self._start("head", head_command(int(port), cpus=self._cpus, dashboard=int(dashboard)))
        wait_for("the job server", self._answers, 300)
        return self

    @property
    def workers(self) -> list[int]:
        """The processes that train on it now."""
        return [pid for process in self._processes for pid in named(process.pid, "RayTrainWorker")]

    @property
    def controllers(self) -> list[int]:
        """The processes that keep the records of what is trained on it now."""
        return [pid for process in self._processes for pid in named(process.pid, "TrainController")]

    @property
    def cleaners(self) -> list[int]:
        """The processes that wait for the end of a controller."""
        return [pid for process in self._processes for pid in named(process.pid, "Cleaner")]

    def add_node(self, name: str, cpus: float = 1) -> str:
        """Starts a further node; returns its temporary directory."""
        return self._start(name, node_command(int(self.gcs.rpartition(":")[2]), cpus=cpus))

    @property
    def nodes(self) -> list[subprocess.Popen]:
        """The processes of the further nodes that have not ended."""
        return [process for process in self._processes[1:] if process.poll() is None]

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            kill(*descendants(process.pid), process.pid)
            process.wait()

    def _start(self, name: str, command: list[str]) -> str:
        folder = str(self.folder / name)
        command = [*command, f"--temp-dir={folder}"]
        with (self.folder / f"{name}.log").open("wb") as log:
            command[0] = str(Path(sys.executable).parent / command[0])  # found whatever PATH its processes have
            environment = {**self.environment, **self._more}
            # in a folder of its own, as heads that people start are not in a checkout
            self._processes.append(subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log))
        return folder

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/api/version", timeout=5).close()
        except urllib.error.HTTPError:
            return True  # it wants the token
        except OSError:
            if self._processes[0].poll() is not None:
                raise RuntimeError((self.folder / "head.log").read_text()[-2000:]) from None
            return False
        return True
