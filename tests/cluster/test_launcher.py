"""`ray up cluster/local.yaml` makes a cluster of machines with nothing but ssh on them; `ray down` ends it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.checkpoint import name
from tests.cluster.site import BIN, ROOT, Site
from tests.hosts import SSH_PROGRAMS, Host, unavailable
from tests.processes import wait_for

MACHINES = ("head", "worker")
KEY = "/tmp/home/.ssh/id_ed25519"
SSHD = ("/usr/sbin/sshd", "-D", "-e", "-o", "PidFile=none", "-o", "StrictModes=no", "-o", "UsePAM=no")
SSH = ("-i", KEY, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes")
STEPS = 20
CLUSTER = "/tmp/home/cluster.yaml"
RAY = ("raylet/raylet", "gcs_server", "monitor.py", "dashboard", "ray::")


class Machines(Site):
    """A site with machines that a team has: reached by ssh, with the packages of the project, and without Ray."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {"RAY_AUTH_MODE": "token"})

    def start(self) -> None:
        super().start()
        self.client.run("mkdir", "--mode=700", "/tmp/home/.ssh")
        self.client.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", KEY)
        self.client.run("sh", "-c", "umask 077; mkdir -p ~/.ray; ray get-auth-token --generate > /dev/null")
        public = self.client.run("cat", f"{KEY}.pub").stdout
        self.machines = [self.machine(each, public) for each in MACHINES]
        home(self.client)
        for machine in self.machines:
            wait_for("sshd", lambda host=machine: self.ssh(host, "true") == 0, 60)
        self.write_config()

    def machine(self, named: str, public: str) -> Host:
        """A host with sshd, a home of its own, and the environment that its owner gave it."""
        host = self.host(named)
        home(host)
        exports = "\n".join(f"export {key}={value}" for key, value in host.environment.items()
                            if key.startswith(("AWS_", "OMP_", "RAY_USAGE")))  # fmt: skip
        host.write("/tmp/home/.ssh/authorized_keys", public)
        host.write("/tmp/home/.bashrc", exports + "\n")
        host.run("mkdir", "-p", "/tmp/home/u2pl-ray", "/run/sshd")
        host.run("ln", "-s", str(BIN.parent), "/tmp/home/u2pl-ray/.venv")
        host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/tmp/host_key")
        log = self.folder / f"sshd-{named}.log"
        host.start(*SSHD, "-h", "/tmp/host_key", "-o", f"ListenAddress={host.address}", log=log)
        return host

    def ssh(self, host: Host, command: str) -> int:
        """The exit code of a command that the client runs on a machine."""
        return self.client.run("ssh", *SSH, f"root@{host.name}", command, check=False).returncode

    def write_config(self) -> None:
        """The project's file with what a team fills in: addresses, user and key."""
        config = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
        head, *workers = [machine.address for machine in self.machines]
        config["provider"].update(head_ip=head, worker_ips=workers)
        config["auth"].update(ssh_user="root", ssh_private_key=KEY)
        self.client.write(CLUSTER, yaml.safe_dump(config))

    def ray(self, *command: str, seconds: float = 300) -> str:
        """What a command of the launcher says on the client, in a checkout."""
        return self.client.run("ray", *command, cwd=str(ROOT), seconds=seconds).stdout

    def nodes(self) -> int:
        """How many nodes are in the cluster."""
        said = self.ray("exec", CLUSTER, "RAY_AUTH_MODE=token ray status")
        active = said.partition("Active:")[2].partition("Pending:")[0]
        return sum(map(int, re.findall(r"^ (\d+) ", active, re.MULTILINE)))


def home(host: Host) -> None:
    """Makes /tmp/home the home of root, also for those who look it up."""
    host.run("sh", "-c", "sed s,:/root:,:/tmp/home:, /etc/passwd > /tmp/passwd")
    host.run("mount", "--bind", "/tmp/passwd", "/etc/passwd")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    reason = unavailable(SSH_PROGRAMS)
    if reason:
        # Hosts can be made without ssh, sshd and rsync, and the other tests run; the launcher reaches none without
        # them. `make test-cluster` ends before it starts where they are missing (see conftest.py).
        pytest.skip(reason)
    with Machines(tmp_path_factory.mktemp("machines")) as machines:
        yield machines


def test_up_train_down(machines: Machines, tmp_path: Path) -> None:
    machines.ray("up", "--yes", "--no-config-cache", CLUSTER, seconds=600)
    head, worker = machines.machines
    wait_for("the worker", lambda: machines.nodes() == 2, 300)

    tunnel = machines.client.start("ray", "dashboard", CLUSTER, log=tmp_path / "tunnel", cwd=str(ROOT))
    machines.jobs = "http://127.0.0.1:8265"
    opened = ("python", "-c", "import socket; socket.create_connection(('127.0.0.1', 8265), 2)")
    wait_for("the tunnel", lambda: machines.client.run(*opened, check=False).returncode == 0, 60)
    flags = ["--method", "suponly", "--optim.steps", str(STEPS), "--scaling.workers", "1"]
    job = machines.train(tmp_path / "log", run := "s3://runs/launched", *flags)
    wait_for("a train worker", lambda: worker.find("RayTrainWorker") or job.over, 300)
    assert job.wait(300) == 0, job.said
    assert machines.read(f"{run}/{name(STEPS)}/state.pt")
    assert tunnel.poll() is None

    machines.ray("down", "--yes", CLUSTER)
    wait_for("the end of Ray on the head", lambda: not running(head), 60)
    wait_for("the end of Ray on the worker, whose head is gone", lambda: not running(worker), 180)


def running(host: Host) -> list[int]:
    """Processes of Ray."""
    return [pid for text in RAY for pid in host.find(text)]
