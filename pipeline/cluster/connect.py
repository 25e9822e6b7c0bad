"""Connecting to Ray: the cluster this job runs in, the one on this machine, or one of its own."""

import logging
import os
import secrets
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from pipeline.errors import RunError, UserError

_CURRENT_CLUSTER = "ray/ray_current_cluster"


def connect() -> None:
    """Connects to Ray once.

    A submitted job and a machine with a running head join that cluster; otherwise a private one starts in this
    process. That one is guarded by a token that only this process and its children know, so nothing is left on disk
    and nobody else on the machine can submit to it.

    Raises:
        UserError: the cluster of this machine cannot be joined.
        RunError: the private one did not come up in time.
    """
    private = not os.environ.get("RAY_ADDRESS") and not _running()
    _environment(token=private and "ray" not in sys.modules)  # Ray reads it when it is imported
    import ray

    if not ray.is_initialized():
        options: dict[str, Any] = {"address": "local", "include_dashboard": False} if private else {}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(logging_level=logging.WARNING, log_to_driver=False, **options)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray's own ends the process with code 15, and without a word
        except (ConnectionError, RuntimeError) as error:
            if private:
                raise
            raise UserError(
                "the Ray cluster noted on this machine cannot be joined: start its head again or end it with "
                "`ray stop`, and export the RAY_AUTH_MODE that it was started with"
            ) from error
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            raise RunError(
                "Ray gives its processes 30 s to start, too few on a machine as busy as this one now: give the "
                "same command again"
            ) from error


def quiet_data() -> None:
    """Switches off Ray Data's own log and progress bars: each job shows its own progress."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.use_datasource_v2 = False
    context.execution_no_progress_timeout_s = -1
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what is wrong is raised, and told once


def default_root() -> Path:
    """The default folder of runs and demo data: the current one, or for a submitted job one in the home directory.

    A submitted job runs in an unpacked copy of the working directory, which Ray deletes.
    """
    here = Path.cwd()
    return Path.home() / "u2pl-ray" if "working_dir_files" in here.parts else here


def _running() -> bool:
    temporary = os.environ.get("RAY_TMPDIR", "/tmp")  # where `ray start` leaves the address of its head
    return (Path(temporary) / _CURRENT_CLUSTER).exists()


def _environment(*, token: bool) -> None:
    """Settings that Ray reads when it is imported or started."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints every line of the loop twice
        "RAY_DATA_USE_DATASOURCE_V2": "0",
        "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "-1",  # a long evaluation is no hang
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # of 30 s that some clouds leave, 5 are many
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it makes of Ctrl-C a sweep that seems done
        "RAY_AIR_NEW_OUTPUT": "0",  # Tune's: it prints tables even when told not to
        "RAY_task_oom_retries": "2",  # by default a task that finds no memory is tried for ever
        "RAY_worker_maximum_startup_concurrency": "16",  # of processes that mostly wait; beyond 4 x it Ray warns
    }.items():
        os.environ.setdefault(name, value)
    if token and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    warnings.filterwarnings("ignore", module="ray")
