"""Sending a job to a cluster: a small package, no secrets, its log here, and its own exit code."""

import asyncio
import logging
import os
import shlex
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.errors import RunError, UserError

LOCAL = "http://127.0.0.1:8265"
"""Where the job server is, on the head node or at the near end of a tunnel to it."""
PULSE_S = 10.0
"""Seconds between two questions whether the job is still there."""
MISSES = 3
"""Questions without an answer, one after the other, after which the cluster counts as gone."""
_SETTINGS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray prefers them to any address that it is given


def submit(command: list[str], address: str | None, root: Path) -> int:
    """Runs a command on the cluster's head and follows it to its end.

    Args:
        command: a script of the package with its flags, such as `jobs/train.py --split 1_2`, or any program.
        address: URL of the job server; None takes RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or else `LOCAL`.
        root: the folder that is sent, without what its `.rayignore` names.

    Returns:
        The command's exit code; 128 and the signal's number if one ended it.

    Raises:
        UserError: there is no job server, it wants another token, or the command names a file of this machine.
        RunError: the cluster went away, or the command never ran to an end.
    """
    words = ["python", *command] if command[0].endswith(".py") else command
    _check_config(command)
    client = _connect(address)
    name = _call(client.submit_job, entrypoint=shlex.join(words), runtime_env={"working_dir": str(root)})
    print(f"job {name}", flush=True)
    try:
        asyncio.run(_follow(client, name))
    except KeyboardInterrupt:
        print(
            f"\nthe job goes on; follow it with `ray job logs --follow {name}`, end it with `ray job stop {name}`",
            flush=True,
        )
        raise
    return _outcome(_call(client.get_job_info, name))


def _check_config(command: list[str]) -> None:
    """A job's config must be where the head finds it."""
    flat = [part for word in command for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    for flag, value in pairwise(flat if command[0].startswith("jobs/") else []):
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
    """Calls the job server; its troubles become one line."""
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
