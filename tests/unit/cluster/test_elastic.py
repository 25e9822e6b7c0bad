"""What Ray's controller, which holds the trainer's parts, needs to import."""

import subprocess
import sys


def test_the_controller_needs_no_torch() -> None:
    """It stays on the head with each run, of which a sweep has many."""
    parts = "import sys, pipeline.cluster.console, pipeline.cluster.elastic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", parts]).returncode == 0
