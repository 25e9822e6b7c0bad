"""What the processes of a sweep take of the head's memory, by kind, while its trials train.

    python benchmarks/head_memory.py [--trials 4] [--asleep]

One private Ray with CPUs for all trials, SupOnly on the generated images, one worker a trial. Memory is counted once
every worker has trained for two looks: the proportional set size (what processes share is divided among them), and the
resident set size (what each would take alone). Workers are listed and not added up, as they run on other nodes. With
--asleep workers sleep in the place of training, so that many trials fit one machine. Linux only.
"""

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installation, like the jobs

import ray

from pipeline.config import cli
from pipeline.config.methods import OPTIONS
from pipeline.config.schema import as_dict
from pipeline.sweep.run import sweep
from pipeline.sweep.trials import make_trials

LOOK_SECONDS = 5.0
MOST_LOOKS = 240
WORKER, SPARE = "RayTrainWorker", "IDLE"


def size(process: Path, file: str, key: str) -> float:
    """MB that a file of /proc names under `key`; 0 if the process has ended."""
    try:
        lines = (process / file).read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), 0.0)


def look() -> dict[str, list[tuple[float, float]]]:
    """Proportional and resident MB of each of Ray's processes, by kind."""
    found = defaultdict(list)
    for process in Path("/proc").iterdir():
        try:
            title = (process / "cmdline").read_text().partition("\0")[0]
        except (OSError, UnicodeDecodeError):
            continue
        if title.startswith("ray::"):
            kind = title.removeprefix("ray::").partition(".")[0]
            found[kind].append((size(process, "smaps_rollup", "Pss:"), size(process, "status", "VmRSS:")))
    return found


def put_to_sleep() -> None:
    """In each process of Ray: what a worker would run is a long sleep."""
    stub = ModuleType("pipeline.training.worker")
    stub.work = lambda values: time.sleep(3600)  # type: ignore[attr-defined]
    sys.modules[stub.__name__] = stub


def measure(trials: int) -> None:
    """Waits until all trials train, prints the table, and ends the process."""
    trained, found = 0, {}
    for _ in range(MOST_LOOKS):
        time.sleep(LOOK_SECONDS)
        found = look()
        trained += len(found.get(WORKER, [])) >= trials
        if trained > 2:
            break
    print(f"{'':<30} processes  PSS MB  RSS MB   (means)")
    for kind, each in sorted(found.items()):
        pss, rss = (statistics.fmean(values) for values in zip(*each, strict=True))
        print(f"{kind:<30} {len(each):9} {pss:7.0f} {rss:7.0f}")
    once = {kind: sum(pss for pss, _ in each) for kind, each in found.items() if len(each) < trials}
    own = {kind: sum(pss for pss, _ in each) for kind, each in found.items() if kind not in (WORKER, SPARE, *once)}
    print(f"a trial, without its worker: {sum(own.values()) / trials:.0f} MB (PSS), {trials} trials", flush=True)
    os.kill(os.getpid(), signal.SIGINT)


def main() -> None:
    """Starts the trials and stops them once they are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--asleep", action="store_true", help="workers sleep")
    args = parser.parse_args()
    trials, hook = args.trials, {"worker_process_setup_hook": put_to_sleep} if args.asleep else {}
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[1]))
    with tempfile.TemporaryDirectory(prefix="head-") as folder:
        flags = ["--preset", "demo", "--method", "suponly", "--split", "1_16", "--optim.steps", "1000000"]
        flags += ["--scaling.workers", "1", "--out", f"{folder}/sweep"]
        ray.init("local", num_cpus=4 * trials, include_dashboard=False, log_to_driver=False, runtime_env=hook)
        config = cli.parse_config(flags, "", OPTIONS)[0]
        threading.Thread(target=measure, args=(trials,), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):  # of `measure`
            sweep(make_trials(as_dict(config), [config.method], [config.split], trials, {}))


if __name__ == "__main__":
    main()
