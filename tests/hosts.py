"""Hosts on one Linux machine: each has its own network, processes, mounts, name, /tmp and /dev/shm.

A host is a set of kernel namespaces that live as long as its first process does. That process reads a pipe of this one
and ends with it, so nothing outlives the tests, not even if they are killed. No namespace has a name, no cable end
touches the machine's own network.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.processes import kill

PROGRAMS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount"}
"""What a host needs, and the Debian packages it is in."""
SSH_PROGRAMS = {"ssh": "openssh-client", "sshd": "openssh-server", "rsync": "rsync"}
"""What hosts need that are reached by ssh."""
NAMESPACES = ("--net", "--mount", "--uts", "--pid", "--ipc")
SUBNET = "10.77.0"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def unavailable(programs: Mapping[str, str] = PROGRAMS) -> str:
    """Why there can be no hosts here, or an empty string."""
    missing = sorted({package for program, package in programs.items() if not shutil.which(program, path=PATH)})
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "hosts need root"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "mount", "-t", "tmpfs", "none", "/mnt"],
                           capture_output=True, text=True)  # fmt: skip
    return f"the kernel forbids namespaces: {tried.stderr.strip()}" if tried.returncode else ""


class Host:
    """One machine; `Network.host` makes it."""

    def __init__(self, name: str, address: str, environment: Mapping[str, str], link: "Link") -> None:
        self.name, self.address = name, address
        self.environment = {"PATH": PATH, "HOME": "/tmp/home", "LANG": "C.UTF-8", **environment}
        self._link = link
        self._processes: list[subprocess.Popen] = []

    @property
    def init(self) -> int:
        """Its first process, as numbered on the outside."""
        return self._link.init

    @property
    def off(self) -> bool:
        return self._link.ended

    def enter(self, *command: str, cwd: str = "/tmp/home") -> list[str]:
        """The command line that runs `command` in this host when run outside of it."""
        return ["nsenter", "--target", str(self.init), *NAMESPACES, "--", "env", f"--chdir={cwd}", *command]

    def run(
        self, *command: str, check: bool = True, seconds: float = 120, cwd: str = "/tmp/home", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end; stdout and stderr are one text.

        Raises:
            RuntimeError: its exit code is not 0 (unless `check` is off).
            TimeoutExpired: it takes longer than `seconds`.
        """
        done = subprocess.run(
            self.enter(*command, cwd=cwd), env={**self.environment, **environment}, timeout=seconds,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: {shlex.join(command)} ended with {done.returncode}:\n{done.stdout}")
        return done

    def start(
        self,
        *command: str,
        log: Path | None = None,
        cwd: str = "/tmp/home",
        **environment: str,
    ) -> subprocess.Popen[str]:
        """Starts a command that runs on; without a log its stdin and stdout are pipes."""
        environment = {**self.environment, **environment}
        if log is None:
            process = subprocess.Popen(self.enter(*command, cwd=cwd), env=environment, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        else:
            with log.open("ab") as out:
                process = subprocess.Popen(self.enter(*command, cwd=cwd), env=environment, text=True,
                                           stdin=subprocess.DEVNULL, stdout=out, stderr=out)  # fmt: skip
        self._processes.append(process)
        return process

    def write(self, path: str, text: str) -> None:
        """Makes a file that only its owner may read, and the folder it is in."""
        script = 'umask 077; mkdir -p "$(dirname "$0")"; printf %s "$1" > "$0"'
        self.run("sh", "-c", script, path, text)

    def find(self, text: str) -> list[int]:
        """This host's processes whose command line holds `text`, as numbered on the outside."""
        if self.off:
            return []
        space = _namespace(self.init)
        return [pid for pid in _pids() if _namespace(pid) == space and text in _command(pid)]

    def unplug(self) -> None:
        """Pulls the cable: packets vanish in both directions."""
        self._link.set("down")

    def plug(self) -> None:
        """Puts it in again."""
        self._link.set("up")

    def power_off(self) -> None:
        """Ends the host at once, without a word to anybody else on the network."""
        if self.off:
            return
        self.unplug()
        self._link.end()
        for process in self._processes:
            process.wait(30)
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
        self._processes = []


class Link:
    """A host's first process and the cable that leads to it."""

    def __init__(self, process: subprocess.Popen[str], run_in_switch: Callable[..., None], port: str) -> None:
        self._process, self._run, self._port = process, run_in_switch, port
        self.init = _children(process.pid)[0]

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def set(self, state: str) -> None:
        self._run("link", "set", self._port, state)

    def end(self) -> None:
        kill(self.init)
        _close(self._process)


class Network:
    """A switch, and the hosts on it; at the end of the block all of them are off.

    Args:
        folder: for /etc/hosts, which all hosts share.
        environment: what every command on every host finds in its environment.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._names = folder / "hosts"
        self._environment = environment or {}
        self._hosts: list[Host] = []

    def __enter__(self) -> "Network":
        self._names.write_text("127.0.0.1 localhost\n")
        self._switch = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        _expect(self._switch, "ready")
        self._ip(self._switch.pid, "link", "add", "bridge", "up", "type", "bridge")
        return self

    def __exit__(self, *error: object) -> None:
        for host in self._hosts:
            host.power_off()
        _close(self._switch)

    @property
    def pids(self) -> list[int]:
        """The processes that hold its namespaces."""
        return [self._switch.pid, *(host.init for host in self._hosts)]

    def host(self, name: str, *, visible: Sequence[Path] = ()) -> Host:
        """Switches on a new host.

        Args:
            name: its name; a new host may have that of one that is off, and then has a new address, too.
            visible: folders below /tmp that it sees although its /tmp is its own.
        """
        number = len(self._hosts) + 1
        address, port = f"{SUBNET}.{number}", f"port{number}"
        others = [line for line in self._names.read_text().splitlines() if line.split()[1] != name]
        self._names.write_text("\n".join([*others, f"{address} {name}", ""]))
        init = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "sh", "-c", _boot(name, self._names, visible)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        _expect(init, "ready")
        link = Link(init, lambda *words: self._ip(self._switch.pid, *words), port)
        self._ip(self._switch.pid, "link", "add", port, "type", "veth", "peer", "eth0", "netns", str(link.init))
        self._ip(self._switch.pid, "link", "set", port, "up", "master", "bridge")
        self._ip(link.init, "addr", "add", f"{address}/24", "dev", "eth0")
        self._ip(link.init, "link", "set", "eth0", "up")
        self._ip(link.init, "route", "add", "default", "via", f"{SUBNET}.254")  # Ray finds its address by it
        self._hosts.append(Host(name, address, self._environment, link))
        return self._hosts[-1]

    @staticmethod
    def _ip(pid: int, *words: str) -> None:
        subprocess.run(["nsenter", "--target", str(pid), "--net", "ip", *words], check=True)


def _boot(name: str, names: Path, visible: Sequence[Path]) -> str:
    """The shell script that becomes a host's first process. It inherits orphans; ignoring their end reaps them."""
    below = [path.resolve() for path in visible if path.resolve().is_relative_to("/tmp")]
    binds = [
        f"mkdir -p /mnt/{path.relative_to('/tmp')}; mount --rbind {path} /mnt/{path.relative_to('/tmp')}"
        for path in below
    ]
    lines = [
        "set -e",
        "mount -t proc proc /proc",
        "mount -t tmpfs -o mode=1777 tmpfs /mnt",
        *binds,
        f"mount --bind {names} /etc/hosts",
        "mount --bind /dev/null /etc/resolv.conf",  # a name that is not there is so at once
        "mount --move /mnt /tmp",
        "mount -t tmpfs -o mode=1777 tmpfs /dev/shm",
        "mkdir /tmp/home",
        f"hostname {name}",
        "ip link set lo up",
        "echo ready",
        "exec env --ignore-signal=CHLD cat",
    ]
    return "\n".join(lines)


def _expect(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdout.readline().strip() != word:
        raise RuntimeError(f"{process.args} ended with {process.wait(10)}: {process.stderr.read().strip()}")


def _close(process: subprocess.Popen[str]) -> None:
    """Ends a process that ends with its stdin."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait(30)
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _namespace(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:  # it has ended meanwhile
        return ""


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(unavailable({**PROGRAMS, **SSH_PROGRAMS}) or 0)
