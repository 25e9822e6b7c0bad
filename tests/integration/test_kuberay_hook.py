"""What Kubernetes runs before it ends the head's pod: the command of the file, where only its pod's processes are."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster_rules import load
from tests.jobs import ROOT
from tests.kuberay_rules import hook, pods

DRIVER = """
import signal, sys, time
def end(*_):
    print("SIGTERM", flush=True)
    time.sleep(float(sys.argv[1]))
    print("the checkpoint is whole", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("trains", flush=True)
time.sleep(60)
"""
POD = """
export PATH={programs}:$PATH
(cd {folder} && exec sh -c 'python -u jobs/train.py "$0"; echo "exit code $?"' {takes}) &
until grep -q trains {log}; do sleep 0.1; done
cd {root} && {hook}
echo "the hook ended with $?"
"""
"""Of a pod: the driver below a shell, as Ray starts it, and then the hook. After the last line all are killed."""
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture
def command() -> list[str]:
    """Of the file, to be run where no process is seen but those of the test."""
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("no namespace of processes can be made here, as root can: the hook would end others' jobs")
    return hook(next(pods(load("kuberay/raycluster.yaml")))[1])


def pod(folder: Path, command: list[str], takes: float) -> list[str]:
    """What is said in a pod whose driver takes so long for its last checkpoint."""
    (folder / "jobs").mkdir()
    (folder / "jobs" / "train.py").write_text(DRIVER)
    log = folder / "log"
    script = POD.format(
        programs=Path(sys.executable).parent, folder=folder, takes=takes, log=log, root=ROOT, hook=" ".join(command)
    )
    with log.open("wb") as out:
        subprocess.run([*NAMESPACE, "sh", "-c", script], stdout=out, stderr=out, timeout=60)
    return [line for line in log.read_text().splitlines() if "spot_watcher" not in line]


def test_it_waits_for_the_checkpoint_of_the_driver(command: list[str], tmp_path: Path) -> None:
    began = time.monotonic()
    said = pod(tmp_path, command, 2)
    assert said == ["trains", "SIGTERM", "the checkpoint is whole", "exit code 143", "the hook ended with 0"]
    assert 2 < time.monotonic() - began < 30


def test_it_waits_no_longer_than_it_says(command: list[str], tmp_path: Path) -> None:
    assert command[-1] == "90"
    assert pod(tmp_path, [*command[:-1], "1"], 30) == ["trains", "SIGTERM", "the hook ended with 1"]
