"""Turns the notice that this machine will be taken back into a drain of its Ray node, or into the end of its jobs.

    python spot_watcher.py --cloud aws          asks every 5 s, until a notice has been passed on
    python spot_watcher.py --drain-now 60       no asking: the node goes in 60 s (preStop hook of a worker's pod)
    python spot_watcher.py --end-jobs 90        the jobs that run here are to end within 90 s (of the head's pod)

Needs the standard library, and `ray` on the PATH to drain. Exit codes: 0 the node is draining or the jobs have ended,
1 that did not succeed before the deadline, 2 there is no such metadata service here.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

AWS, GCP = "http://169.254.169.254", "http://metadata.google.internal"
AWS_NOTICE_S, GCP_NOTICE_S = 120.0, 30.0
MARGIN_S = 10.0
"""Ray is told of an earlier end: what dies before Ray's own deadline counts as a failure, and telling takes seconds."""
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would answer for another machine


@dataclass(frozen=True)
class Notice:
    """What the cloud said, and when the machine goes (seconds since the epoch)."""

    text: str
    deadline: float


class Unavailable(Exception):
    """The metadata service gave no answer that can be used."""


def ask(url: str, headers: dict[str, str], method: str = "GET", timeout: float = 2.0) -> str | None:
    """One request to the metadata service.

    Returns:
        The body, or None if the service says that there is no such entry (404).

    Raises:
        Unavailable: it is not reached, does not answer in time, or answers with another error.
    """
    try:
        with _OPENER.open(urllib.request.Request(url, headers=headers, method=method), timeout=timeout) as answer:
            return answer.read(65536).decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise Unavailable(f"{url} answers {error.code}") from error
    except (OSError, ValueError) as error:  # refused, no route, time-out, cut off, no text
        raise Unavailable(f"{url}: {error}") from error


def aws_notice(base: str) -> Notice | None:
    """EC2's interruption notice, by version 2 of its metadata service; it comes two minutes ahead."""
    token = ask(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    if not token:
        raise Unavailable(f"{base} gives no token")
    body = ask(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    if body is None:
        return None
    try:
        notice = json.loads(body)
        action, moment = str(notice["action"]), str(notice.get("time"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unavailable(f"no notice: {body[:80]!r}") from error
    try:
        deadline = datetime.strptime(moment, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        deadline = time.time() + AWS_NOTICE_S
    return Notice(f"EC2 will {action} this instance", deadline)


def gcp_notice(base: str) -> Notice | None:
    """Compute Engine's flag that a spot machine is being stopped; at most 30 s are left then."""
    body = ask(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    if body is None or body.strip() not in ("TRUE", "FALSE"):
        raise Unavailable(f"no preemption flag: {(body or 'nothing')[:80]!r}")
    return Notice("Compute Engine is stopping this machine", time.time() + GCP_NOTICE_S) if body[0] == "T" else None


def watch(look: Callable[[], Notice | None], interval: float, patience: float) -> Notice | None:
    """Asks until there is a notice.

    Args:
        look: asks once.
        interval: seconds between two questions.
        patience: seconds after which a service that has never answered counts as absent. One that has may be away
            for any time.

    Returns:
        The notice, or None if there is no such service.
    """
    started, seen, trouble = time.monotonic(), False, ""
    while True:
        try:
            notice = look()
            if notice:
                return notice
            if trouble or not seen:
                say("watching for a notice")
            seen, trouble = True, ""
        except Unavailable as error:
            if str(error) != trouble:  # each kind of trouble once, not every 5 s
                say(trouble := str(error))
            if not seen and time.monotonic() - started > patience:
                return None
        time.sleep(interval)


def _processes(proc: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Id, program and arguments of all processes of this machine; in a container, of its own."""
    for file in proc.glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            program, *arguments = file.read_text(errors="replace").rstrip("\0").split("\0")
            yield int(file.parent.name), Path(program).name, arguments


def raylets(proc: Path = Path("/proc"), temp_dir: str | None = None) -> list[tuple[str, str]]:
    """Node id and GCS address of the Ray nodes of this machine, from their command lines."""
    found = []
    for _, program, arguments in _processes(proc):
        if program == "raylet":
            flags = {name: value for name, _, value in (each.partition("=") for each in arguments)}
            if temp_dir in (None, flags.get("--temp_dir")):
                found.append((flags.get("--node_id", ""), flags.get("--gcs-address", "")))
    return found


def jobs(proc: Path = Path("/proc")) -> set[int]:
    """The processes that run `jobs/NAME.py`, `-m pipeline` or `u2pl`; neither their shells nor Ray's workers."""
    found = set()
    for pid, program, arguments in _processes(proc):
        while arguments and arguments[0].startswith("-") and arguments[0] != "-m":  # as in `python -u jobs/train.py`
            arguments = arguments[1:]
        script = Path(arguments[0] if arguments else "")
        ours = (script.parent.name == "jobs" and script.suffix == ".py") or script.name == "u2pl"
        if program.startswith("python") and (ours or arguments[:2] == ["-m", "pipeline"]):
            found.add(pid)
    return found


def end_jobs(deadline: float, pause: float = 0.5) -> bool:
    """Asks the jobs of this machine to end, each once, as a second SIGTERM ends at once; whether all have in time."""
    asked: set[int] = set()
    while running := jobs():
        if time.time() > deadline:
            return False
        for pid in running - asked:
            say(f"process {pid} is to write its checkpoint and end")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        asked |= running
        time.sleep(pause)
    return True


def drain(node: tuple[str, str], notice: Notice) -> bool:
    """Tells the cluster that a node of this machine goes; whether it has been accepted."""
    left = max(1, int(notice.deadline - MARGIN_S - time.time()))
    command = ["ray", "drain-node", "--node-id", node[0], "--address", node[1]]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", notice.text]
    try:
        command += ["--deadline-remaining-seconds", str(left)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        say(f"drain-node: {error}")
        return False
    if done.returncode:
        say(f"drain-node: {' '.join((done.stderr or done.stdout).split())[-300:]}")
    return done.returncode == 0


def drain_all(notice: Notice, temp_dir: str | None = None, pause: float = 1.0) -> bool:
    """Drains every Ray node of this machine, again while that fails; whether it succeeded before the deadline."""
    while True:
        nodes = raylets(temp_dir=temp_dir)
        accepted = [drain(node, notice) for node in nodes]
        if nodes and all(accepted):
            return True
        if not nodes:
            say("no Ray node runs here")
        if time.time() > notice.deadline:
            return False
        time.sleep(pause)


def say(text: str) -> None:
    """A line with the time, for the log."""
    print(f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ} spot_watcher: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cloud", choices=["aws", "gcp"], help="whose metadata service is asked")
    source.add_argument("--drain-now", type=float, metavar="SECONDS", help="drain; wait until Ray or the time is gone")
    source.add_argument("--end-jobs", type=float, metavar="SECONDS", help="end the jobs; wait for them, no longer")
    parser.add_argument("--metadata-url", help="base address of the metadata service")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two questions (default: 5)")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds until an absent service ends this")
    parser.add_argument("--temp-dir", help="only the Ray node with this temporary directory (default: all)")
    args = parser.parse_args(argv)
    if args.end_jobs is not None:
        ended = end_jobs(time.time() + args.end_jobs)
        say("no job runs here" if ended else "jobs still run: the time is over")
        return 0 if ended else 1
    if args.drain_now is not None:
        notice: Notice | None = Notice("this node is being taken down", time.time() + args.drain_now)
    else:
        base = (args.metadata_url or (AWS if args.cloud == "aws" else GCP)).rstrip("/")
        look = aws_notice if args.cloud == "aws" else gcp_notice
        notice = watch(lambda: look(base), args.interval, args.patience)
    if notice is None:
        say(f"no metadata service of {args.cloud} here: nothing to watch")
        return 2
    say(notice.text)
    drained = drain_all(notice, args.temp_dir)
    while args.drain_now is not None and raylets(temp_dir=args.temp_dir) and time.time() < notice.deadline:
        time.sleep(0.5)
    say("draining" if drained else "the drain did not succeed in time")
    return 0 if drained else 1


if __name__ == "__main__":
    sys.exit(main())
