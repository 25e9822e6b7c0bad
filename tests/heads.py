"""A small Ray head with a job server and a token, as `ray start` makes it, and nodes beside it."""

import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tests.processes import descendants, kill, wait_for
from tests.s3 import free_ports

_SMALL = ["--block", "--num-cpus=1", "--object-store-memory=80000000", "--dashboard-agent-listen-port=0"]


class Head:
    """A head of its own, under a private home directory; ended with all that it started at the end of the block."""

    def __init__(self, folder: str) -> None:
        """Args: folder: a short path, as it holds sockets."""
        self.folder = Path(folder)
        self.home = self.folder / "home"
        (self.home / ".ray").mkdir(parents=True)
        token = self.home / ".ray" / "auth_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        gcs, dashboard = free_ports(2)
        self.gcs, self.url = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        self._processes: list[subprocess.Popen] = []

    @property
    def environment(self) -> dict[str, str]:
        """What a client of this cluster has set."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"HOME": str(self.home), "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(self.folder), "PATH": path}
        return {**os.environ, **own}

    def __enter__(self) -> "Head":
        port, dashboard = self.gcs.rpartition(":")[2], self.url.rpartition(":")[2]
        self._start("head", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}")
        wait_for("the job server", self._answers, 300)
        return self

    def add_node(self, name: str) -> str:
        """Starts a further node; returns its temporary directory."""
        return self._start(name, f"--address={self.gcs}", "--node-ip-address=127.0.0.1")

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            kill(*descendants(process.pid), process.pid)
            process.wait()

    def _start(self, name: str, *flags: str) -> str:
        folder = str(self.folder / name)
        command = ["ray", "start", *flags, f"--temp-dir={folder}", *_SMALL, "--disable-usage-stats"]
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
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
