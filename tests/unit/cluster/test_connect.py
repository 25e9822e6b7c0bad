"""How this package joins Ray, in a process of its own."""

import os
import subprocess
import sys

CONNECT = """
import signal
from pipeline.cluster.connect import connect

def ours(number, frame):
    raise SystemExit("ours")

signal.signal(signal.SIGTERM, ours)
connect()
signal.raise_signal(signal.SIGTERM)
"""


def test_sigterm_stays_what_it_was(ray_folder: str) -> None:
    """Ray takes it over when it is joined, and ends the process with 15 and without a word."""
    values = {**os.environ, "RAY_TMPDIR": ray_folder}
    done = subprocess.run([sys.executable, "-c", CONNECT], env=values, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ours")
