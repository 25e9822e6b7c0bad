"""Sending a job to a cluster: a small package, no secrets, its log here, and its own exit code."""

import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import RunError, UserError

_ROOT = Path(pipeline.__file__).resolve().parents[1]
CHECKOUT = _ROOT if (_ROOT / "jobs" / "_run.py").is_file() else None
"""The folder that holds this package and its jobs; None where the package is installed."""
LOCAL = "http://127.0.0.1:8265"
"""Where the job server is, on the head node or at the near end of a tunnel to it."""
PULSE_S = 10.0
"""Seconds between two requests for the job's status."""
STOP_S = 120
"""Seconds that `ray job stop` leaves a job for its last checkpoint; Ray's own 3 are too few for most."""
NOT_FOUND = 127
"""Exit code of a shell that does not find the program."""
MISSES = 3
"""Unanswered requests in a row after which the cluster counts as gone."""
_SETTINGS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray prefers them to any address that it is given


def submit(command: list[str], address: str | None) -> int:
    """Runs a command on the cluster's head and follows it to its end.

    Args:
        command: any program with its flags, or a script of the checkout, such as `jobs/train.py --split 1_2`.
        address: URL of the job server; None takes RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or else `LOCAL`.

    Returns:
        The command's exit code; 128 and the signal's number if one ended it.

    Raises:
        UserError: there is no job server, it wants another token, or the command names a file of this machine.
        RunError: the cluster went away, or the command never ran to an end.
    """
    words, environment = _entrypoint(command), _environment()
    _check_config(words)
    client = _connect(address)
    name = _call(client.submit_job, entrypoint=shlex.join(words), runtime_env=environment)
    print(f"job {name}", flush=True)
    try:
        asyncio.run(_follow(client, name))
    except KeyboardInterrupt:
        print(
            f"\nthe job goes on; follow it with `ray job logs --follow {name}`, end it with `ray job stop {name}`",
            flush=True,
        )
        raise
    code = _outcome(_call(client.get_job_info, name))
    if code == NOT_FOUND and words[0] == "python":
        print(
            "the head has no `python` on its PATH: activate the environment there before `ray start`", file=sys.stderr
        )
    return code


def from_ray(*, entrypoint: Sequence[str], address: str | None, no_wait: bool, **options: Any) -> None:
    """What `ray job submit` calls first where this package is installed (Ray's RAY_JOB_SUBMIT_HOOK).

    `ray job submit -- python jobs/train.py` would look for the script in the folder in which the head was started. From
    a checkout, and with no options but these, it is sent as `submit` does, which ends the process. Otherwise one line
    tells what is missing, and Ray goes on.

    Args:
        entrypoint: the words after `--`.
        address: as for `submit`.
        no_wait: do not follow the job.
        options: all others of `ray job submit`, None where they are not given.
    """
    script = next((word for word in entrypoint if word.startswith("jobs/") and word.endswith(".py")), None)
    if script is None or any(options.get(name) for name in ("working_dir", "runtime_env", "runtime_env_json")):
        return
    here = CHECKOUT is not None and Path.cwd().resolve() == CHECKOUT
    if here and list(entrypoint[:1]) == ["python"] and not no_wait and not any(options.values()):
        from pipeline.config import cli

        print(f"{script} is a script of this folder, which is sent along (--working-dir .)", flush=True)
        cli.run(lambda _: sys.exit(submit(list(entrypoint), address)))
    remedy = (
        "add --working-dir . before --" if Path(script).is_file() else "call it in a checkout, with --working-dir ."
    )
    print(
        f"{script}: the head looks for it in the folder in which it was started; if it is not there, {remedy}",
        flush=True,
    )


def _entrypoint(command: list[str]) -> list[str]:
    """The words that the head runs.

    Raises:
        UserError: a script of a checkout, where there is none.
    """
    words = ["python", *command] if command[0].endswith(".py") else command
    if CHECKOUT is None and any(word.startswith("jobs/") for word in words[:2]):
        name = next(Path(word).stem for word in words if word.startswith("jobs/"))
        raise UserError(f"jobs/{name}.py belongs to a checkout, and this package is installed: say -- {name} [FLAGS]")
    return words


def _environment() -> dict[str, Any]:
    """The runtime environment: the checkout without what its .rayignore names, or the installed package."""
    patience = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}}
    if CHECKOUT:
        return {"working_dir": str(CHECKOUT), **patience}
    return {"py_modules": [str(Path(pipeline.__file__).parent)], **patience}


def _check_config(words: list[str]) -> None:
    """Refuses a config file that the head cannot read."""
    ours = words[:3] == ["python", "-m", "pipeline"] or any(word.startswith("jobs/") for word in words[:2])
    flat = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    for flag, value in pairwise(flat if ours else []):
        if flag == "--config" and "://" not in value and not value.startswith(("/", "pipeline/", "jobs/")):
            raise UserError(f"--config {value}: is not sent to the cluster; copy it to the bucket and name its URI")


def _connect(address: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    for quiet in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    if address or not any(os.environ.get(name) for name in _SETTINGS):
        os.environ[_SETTINGS[0]] = address or LOCAL
    try:
        return _call(JobSubmissionClient)
    except RunError as error:
        where = address or next(filter(None, map(os.environ.get, _SETTINGS)))
        raise UserError(f"no job server at {where}: is the cluster up, and the tunnel to it? ({error})") from error


def _call(method: Any, *args: Any, **options: Any) -> Any:
    """Calls the job server and turns its errors into one line."""
    from ray.exceptions import AuthenticationError

    try:
        return method(*args, **options)
    except AuthenticationError as error:
        raise UserError(
            "the cluster wants its token: export RAY_AUTH_MODE=token, with the cluster's token in "
            "~/.ray/auth_token (or in RAY_AUTH_TOKEN_PATH)"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(str(error).strip().partition("\n")[0]) from error


async def _follow(client: Any, name: str) -> None:
    """Prints the log until the job has ended or the cluster has gone."""
    tail, pulse = asyncio.create_task(_tail(client, name)), asyncio.create_task(_pulse(client, name))
    done, left = await asyncio.wait({tail, pulse}, return_when=asyncio.FIRST_COMPLETED)
    for task in left:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    for task in done:
        task.result()


async def _tail(client: Any, name: str) -> None:
    import aiohttp

    try:
        async for lines in client.tail_job_logs(name):
            print(lines, end="", flush=True)
    except (OSError, RuntimeError, aiohttp.ClientError) as error:
        raise RunError(_lost(name)) from error
    while not (await asyncio.to_thread(_call, client.get_job_status, name)).is_terminal():
        await asyncio.sleep(0.2)


async def _pulse(client: Any, name: str) -> None:
    """Notices a head that has vanished without closing the connection."""
    missed = 0
    while True:
        await asyncio.sleep(PULSE_S)
        try:
            await asyncio.to_thread(_call, client.get_job_status, name)
            missed = 0
        except RunError as error:
            missed += 1
            if missed == MISSES:
                raise RunError(_lost(name)) from error


def _lost(name: str) -> str:
    return (
        f"lost the cluster while following {name}: if its head still runs, `ray job logs --follow {name}` goes on; "
        "if not, the same command on a new cluster resumes the run"
    )


def _outcome(details: Any) -> int:
    code = details.driver_exit_code
    if details.status == "SUCCEEDED":
        return 0
    if code is None:
        why = (details.message or "without a message").strip().splitlines()[-1]
        raise RunError(f"the job ended as {details.status}: {why}")
    return code if code >= 0 else 128 - code
