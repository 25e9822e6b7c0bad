"""slurm.sbatch: its form; tests/integration/test_slurm.py runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.cluster_rules import CLUSTER

SCRIPT = CLUSTER / "slurm.sbatch"


def test_it_asks_for_what_the_page_says() -> None:
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", SCRIPT.read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"
    assert {"nodes", "gpus-per-node", "cpus-per-task", "time", "requeue", "exclusive"} <= set(asked)
    assert asked["open-mode"] == "append"  # a second start does not wipe the first one's log
    assert re.fullmatch(r"B:USR1@\d+", asked["signal"])


def test_the_shell_is_sound() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True).returncode == 0
    checker = [str(Path(sys.executable).parent / "shellcheck"), str(SCRIPT)]
    done = subprocess.run(checker, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_outside_of_slurm_it_says_so() -> None:
    values = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(["bash", str(SCRIPT)], env=values, capture_output=True, text=True)
    assert done.returncode != 0
    assert "this is a SLURM batch script" in done.stderr
