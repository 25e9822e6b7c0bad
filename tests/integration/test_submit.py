"""jobs/submit.py against a real head: what is sent, whose exit code comes back, and what is said when it goes wrong."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.heads import Head
from tests.jobs import ROOT, Job
from tests.processes import wait_for
from tests.s3 import free_ports

LISTING = "import os; print(sorted(p for p, _, _ in os.walk('.')), sorted(os.listdir('.')))"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with (
        tempfile.TemporaryDirectory(prefix="u2pl-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        Head(folder) as it,
    ):
        yield it


def submitted(head: Head, *command: str, url: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, "jobs/submit.py", "--address", url or head.url, "--", *command]
    values = {**head.environment, **environment}
    return subprocess.run(arguments, cwd=ROOT, env=values, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["python", "-c", "print('it ran')"], 0),
        (["jobs/train.py", "--nonsense"], 2),
        (["bash", "-c", "exit 3"], 3),
        (["bash", "-c", "kill -9 $$"], 128 + signal.SIGKILL),
    ],
)
def test_the_code_is_the_jobs_own(head: Head, command: list[str], code: int) -> None:
    done = submitted(head, *command)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if code == 0:
        assert "it ran" in done.stdout
    if code == 2:
        assert "train.py: unknown argument '--nonsense'" in done.stdout


def test_only_what_is_needed_is_sent(head: Head) -> None:
    secret = ROOT / "pipeline" / "secret.pem"
    secret.write_text("not for the cluster")
    try:
        done = submitted(head, "python", "-c", LISTING + "; print(os.path.exists('pipeline/secret.pem'))")
    finally:
        secret.unlink()
    folders, _, names = done.stdout.splitlines()[-2].rpartition(" [")
    assert names == "'jobs', 'pipeline', 'pyproject.toml']"
    assert "__pycache__" not in folders
    assert "'./pipeline/presets'" in folders
    assert done.stdout.splitlines()[-1] == "False"


def test_no_secret_is_in_the_runtime_environment(head: Head) -> None:
    done = submitted(head, "bash", "-c", "true", AWS_SECRET_ACCESS_KEY="of-the-client")
    name = done.stdout.split()[1]
    script = (
        "from ray.job_submission import JobSubmissionClient as C; "
        f"print(C({head.url!r}).get_job_info({name!r}).model_dump_json())"
    )
    told = subprocess.run([sys.executable, "-c", script], env=head.environment, capture_output=True, text=True)
    assert name in told.stdout
    assert "of-the-client" not in told.stdout
    assert "AWS_" not in told.stdout


@pytest.mark.parametrize(
    ("mode", "token"), [("disabled", None), ("token", "0" * 64)], ids=["no token", "a wrong token"]
)
def test_without_the_token_it_is_refused_in_one_line(head: Head, mode: str, token: str | None) -> None:
    done = submitted(head, "true", RAY_AUTH_MODE=mode, **({"RAY_AUTH_TOKEN": token} if token else {}))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "wants its token" in line
    assert "RAY_AUTH_MODE=token" in line


def test_no_cluster_there_is_one_line(head: Head) -> None:
    done = submitted(head, "true", url=f"http://127.0.0.1:{free_ports(1)[0]}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no job server at http://127.0.0.1:" in line


def test_no_job_given_is_one_line(head: Head) -> None:
    done = submitted(head)
    assert done.returncode == 2
    assert "no job given" in done.stderr


@pytest.mark.parametrize("flags", [["--config", "mine.yaml"], ["--config=mine.yaml"]])
def test_a_config_of_this_machine_is_one_line(head: Head, flags: list[str]) -> None:
    done = submitted(head, "jobs/train.py", *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--config mine.yaml: is not sent to the cluster" in line


def test_interrupting_leaves_the_job_running_and_says_so(head: Head, tmp_path: Path) -> None:
    mark = tmp_path / "finished"
    script = f"import time, pathlib; print('going', flush=True); time.sleep(6); pathlib.Path({str(mark)!r}).touch()"
    arguments = [sys.executable, "jobs/submit.py", "--address", head.url, "--", "python", "-c", script]
    with Job(arguments, head.environment, tmp_path / "log") as job:
        wait_for("its first line", lambda: "\ngoing" in job.said)
        os.kill(job.pid, signal.SIGINT)
        assert job.wait(60) == 130
        assert "the job goes on; follow it with `ray job logs --follow raysubmit_" in job.said
        assert "Traceback" not in job.said
        wait_for("the job itself", mark.exists)


def test_a_head_that_dies_meanwhile_is_one_line(ray_folder: str, tmp_path: Path) -> None:
    with Head(ray_folder) as own:
        script = "import time; print('going', flush=True); time.sleep(300)"
        arguments = [sys.executable, "jobs/submit.py", "--address", own.url, "--", "python", "-c", script]
        with Job(arguments, own.environment, tmp_path / "log") as job:
            wait_for("its first line", lambda: "\ngoing" in job.said)
            own.__exit__()
            assert job.wait(120) == 1
            assert "submit.py: lost the cluster while following raysubmit_" in job.said.splitlines()[-1]
            assert "Traceback" not in job.said
