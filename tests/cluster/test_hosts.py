"""The hosts themselves: apart from each other and from this machine, and gone when they should be."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, Network, unavailable
from tests.processes import wait_for

ROOT = Path(__file__).parents[2]
SERVE = ("python3", "-m", "http.server", "8000")
GET = ("python3", "-c", "import urllib.request as u; print(u.urlopen('http://one:8000', timeout=2).status)")


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Network(tmp_path, {"COLOUR": "blue"}) as network:
        yield network


def answers(host: Host) -> bool:
    return host.run(*GET, check=False).stdout.strip() == "200"


def spaces(pids: Iterable[int]) -> set[Path]:
    """The network namespaces that the processes are in."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.add(Path(f"/proc/{pid}/ns/net").readlink())
    return found


def all_pids() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]


def test_hosts_reach_each_other_and_nothing_else(network: Network, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    (seen / "file").write_text("text")
    one, two = network.host("one", visible=[seen]), network.host("two")
    one.start(*SERVE, log=tmp_path / "server.log")
    wait_for("the server", lambda: answers(two))

    assert one.run("hostname").stdout == "one\n"
    assert one.run("sh", "-c", "echo $COLOUR $EXTRA; pwd", EXTRA="sky").stdout == "blue sky\n/tmp/home\n"
    assert one.run("cat", str(seen / "file")).stdout == "text"
    assert two.run("ls", "/tmp").stdout == "home\n"
    assert two.run("ls", "/dev/shm").stdout == ""
    assert len(two.run("ps", "-e", "-o", "pid=").stdout.split()) == 2  # cat and ps itself
    assert len(two.run("ip", "-brief", "link").stdout.splitlines()) == 2  # lo and eth0
    assert "http.server" not in two.run("ps", "ax").stdout
    assert len(one.find("http.server")) == 1
    assert two.find("http.server") == []
    with pytest.raises(RuntimeError, match=r"two: sh -c 'echo no; exit 3' ended with 3:\nno"):
        two.run("sh", "-c", "echo no; exit 3")


def test_cable_and_power(network: Network, tmp_path: Path) -> None:
    one, two = network.host("one"), network.host("two")
    server = one.start(*SERVE, log=tmp_path / "server.log")
    wait_for("the server", lambda: answers(two))
    one.unplug()
    assert not answers(two)
    assert answers(one)
    one.plug()
    wait_for("the cable", lambda: answers(two))
    one.power_off()
    assert server.poll() is not None
    assert not answers(two)
    again = network.host("one")
    assert again.address != one.address
    again.start(*SERVE, log=tmp_path / "again.log")
    wait_for("the next host of that name", lambda: answers(two))


def test_orphans_are_reaped(network: Network) -> None:
    host = network.host("one")
    host.run("sh", "-c", "sleep 0.2 & sleep 0.1 &")  # their parent is gone: the first process inherits them
    wait_for("their end", lambda: host.run("ps", "-e", "-o", "comm=").stdout.split() == ["cat", "ps"], 10)


def test_what_is_missing_is_named() -> None:
    assert unavailable({"no-such-program": "its-package", "ip": "iproute2"}) == "not installed: its-package"
    assert not unavailable()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with Network(tmp_path) as network:
        host = network.host("one")
        sleeper = host.start("sleep", "1000", log=tmp_path / "log")
        made = spaces(network.pids)
        assert len(made) == 2
        assert len(made - spaces([os.getpid()])) == 2
    assert sleeper.returncode is not None
    assert not spaces(network.pids)
    assert not made & spaces(all_pids())


def test_nothing_outlives_killed_tests(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from tests.hosts import Network
with Network(Path({str(tmp_path)!r})) as network:
    network.host("one").start("sleep", "1000", log=Path({str(tmp_path / "log")!r}))
    print(*network.pids, flush=True)
    input()
"""
    tests = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert tests.stdin is not None
    assert tests.stdout is not None
    with tests.stdin, tests.stdout:
        made = spaces(map(int, tests.stdout.readline().split()))
        assert len(made) == 2
        tests.send_signal(signal.SIGKILL)
        tests.wait(10)
        wait_for("their end", lambda: not made & spaces(all_pids()), 10)
