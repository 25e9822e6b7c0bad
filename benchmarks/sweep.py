"""What Ray Tune costs per trial, beside the same training started plainly.

    python benchmarks/sweep.py [--rounds 5] [--steps 900]

One Ray cluster, SupOnly on the generated images, one worker; a run started plainly and a run as the one trial of a
sweep take turns, each in a new directory. A run's own time counts from the moment Ray Train begins with it, which
leaves a mark in its directory, to the moment the caller has its result. What comes before is the start: of a process
and its imports for a trial, nothing for a plain run, whose process is up.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installation, like the jobs

from pipeline.cluster.connect import connect
from pipeline.config import cli
from pipeline.config.methods import OPTIONS
from pipeline.config.schema import Config, as_dict
from pipeline.sweep.run import sweep
from pipeline.sweep.trials import make_trials
from pipeline.training.launch import launch
from pipeline.training.preflight import resolve_paths

MARK = ".validate_storage_marker"
"""Written by Ray Train when it begins with a run."""


def timed(config: Config, *, tuned: bool) -> tuple[float, float]:
    """Seconds of the start and of the run itself.

    Args:
        config: of the run; `out` is a new directory.
        tuned: as a trial of a sweep.
    """
    began = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        if tuned:
            trials = make_trials(as_dict(config), [config.method], [config.split], 1, {})
            assert not sweep(trials)
            out = trials[0].out
        else:
            config = resolve_paths(config)
            launch(config)
            out = str(config.out)
    up = (Path(out) / MARK).stat().st_mtime
    return up - began, time.time() - up


def main() -> None:
    """Runs the rounds and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=900)
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[1]))
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        flags = ["--preset", "demo", "--method", "suponly", "--split", "1_16", "--optim.steps", str(arguments.steps)]
        connect()
        took: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for index in range(-1, arguments.rounds):  # the first one warms up and does not count
            for tuned in (False, True):
                out = ["--scaling.workers", "1", "--out", f"{folder}/{index}-{tuned}"]
                pair = timed(cli.parse_config([*flags, *out], "", OPTIONS)[0], tuned=tuned)
                if index >= 0:
                    took[tuned].append(pair)
    print(f"{'':<8}  start s  run s   (medians of {arguments.rounds} rounds, {arguments.steps} steps)")
    for tuned, name in ((False, "plain"), (True, "Tune")):
        start, run = (statistics.median(each) for each in zip(*took[tuned], strict=True))
        print(f"{name:<8}  {start:7.2f}  {run:6.2f}")
    ratios = [tune[1] / plain[1] for plain, tune in zip(took[False], took[True], strict=True)]
    print(f"run, Tune / plain: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} by round)")


if __name__ == "__main__":
    main()
