"""jobs/submit.py against a real head: what is sent, whose exit code comes back, and what is said when it goes wrong."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import checkpoint
from tests.heads import Head
from tests.jobs import ROOT, SHORT, Job, records
from tests.processes import wait_for
from tests.s3 import S3Server, free_ports

LISTING = "import os; print(sorted(p for p, _, _ in os.walk('.')), sorted(os.listdir('.')))"


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


def by_ray(head: Head, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """`ray job submit`, as the package's installation and Ray make it, from a folder; the head is in another one."""
    hook = {
        "RAY_JOB_SUBMIT_HOOK": "pipeline.cluster.submit.from_ray"
    }  # what u2pl_ray.pth sets where the package is installed
    values = {**head.environment, **hook, "PYTHONPATH": str(ROOT), "RAY_API_SERVER_ADDRESS": head.url}
    arguments = ["ray", "job", "submit", *flags]
    return subprocess.run(arguments, cwd=folder, env=values, capture_output=True, text=True, timeout=300)


def test_the_line_of_ray_works_from_a_checkout_whatever_folder_the_head_is_in(head: Head) -> None:
    done = by_ray(head, ROOT, "--", "python", "jobs/train.py", "--nonsense")
    assert done.returncode == 2, done.stdout + done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first == "jobs/train.py is a script of this folder, which is sent along (--working-dir .)"
    assert second.startswith("job raysubmit_")
    assert "train.py: unknown argument '--nonsense'" in done.stdout


def test_a_run_trains_there_is_stopped_and_goes_on(head: Head, shapes: str, s3: S3Server, tmp_path: Path) -> None:
    out = "s3://runs/submitted"
    command = ["jobs/train.py", *SHORT, "--data", shapes, "--out", out, "--optim.steps", "80", "--scaling.workers", "1"]
    first = [sys.executable, "jobs/submit.py", "--address", head.url, "--", *command]
    with Job(first, head.environment, tmp_path / "first.log") as job:
        wait_for("some steps", lambda: "step      5/80" in job.said or job.ended, 240)
        name = next(line for line in job.said.splitlines() if line.startswith("job ")).removeprefix("job ")
        stop = ["ray", "job", "stop", name, "--address", head.url]
        subprocess.run(stop, env=head.environment, check=True, capture_output=True, timeout=120)
        assert job.wait() == 1, job.said
    found = re.search(r"train.py: stopped by SIGTERM after step (\d+); the same command goes on from there", job.said)
    assert found, job.said
    step = int(found[1])
    assert 5 < step < 80
    assert checkpoint.verify(f"{out}/{checkpoint.name(step)}").step == step
    done = by_ray(head, ROOT, "--", "python", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming from {out}/{checkpoint.name(step)}" in done.stdout
    assert "val mIoU last" in done.stdout
    assert [record["step"] for record in records(out)] == list(range(1, 81))


KILLED_AT_ONCE = """
import os, ray
ray.init(log_to_driver=False)
from pipeline.cluster.internals import EndingCleaner

@ray.remote(num_cpus=0)
class Controller:
    def __init__(self):
        own = ray.get_runtime_context().get_actor_id()
        self.cleaner = ray.remote(num_cpus=0)(EndingCleaner).options(lifetime="detached").remote(own, 3.0, 10.0, 15.0)
        self.cleaner.start_monitoring.remote()

    def ready(self):
        return os.getpid()

controller = Controller.remote()
ray.get(controller.ready.remote())
os._exit(0)
"""


ANOTHER_RAY = "import ray; ray.init('local', num_cpus=1, include_dashboard=False); print('up', flush=True); input()"


def test_a_run_that_is_killed_as_it_begins_leaves_nothing_on_the_head(head: Head, ray_folder: str) -> None:
    """Ray's own cleaner stays: it learns of the controller from the controller, which has gone before it is up.

    It stays as well where another Ray runs on the machine, as it then does not know which of the two is its own.
    """
    environment = {**os.environ, "RAY_TMPDIR": ray_folder}
    command = [sys.executable, "-c", ANOTHER_RAY]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert any(line == "up\n" for line in other.stdout)
        subprocess.run(
            [sys.executable, "-c", KILLED_AT_ONCE],
            env={**head.environment, "RAY_ADDRESS": head.gcs},
            cwd=ROOT,
            check=True,
        )
        wait_for("the cleaner", lambda: bool(head.cleaners), 60)
        wait_for("the end of the cleaner", lambda: not head.cleaners)


def test_with_a_working_dir_ray_does_it_alone(head: Head) -> None:
    done = by_ray(head, ROOT, "--working-dir", ".", "--", "python", "jobs/train.py", "--nonsense")
    assert done.returncode == 1
    assert "is sent along" not in done.stdout
    assert "train.py: unknown argument '--nonsense'" in done.stdout


@pytest.mark.parametrize("flags", [[], ["--submission-id", "of-my-own"]], ids=["elsewhere", "with flags of Ray's"])
def test_else_the_first_line_says_what_to_add(head: Head, tmp_path: Path, flags: list[str]) -> None:
    done = by_ray(head, ROOT if flags else tmp_path, *flags, "--", "python", "jobs/train.py", "--nonsense")
    assert done.returncode == 1
    first = done.stdout.splitlines()[0]
    remedy = "add --working-dir . before --" if flags else "call it in a checkout, with --working-dir ."
    assert first.startswith("jobs/train.py: the head looks for it in the folder in which it was started")
    assert first.endswith(remedy)
    assert "can't open file" in done.stdout


def test_programs_that_are_not_ours_are_let_through(head: Head, tmp_path: Path) -> None:
    done = by_ray(head, tmp_path, "--", "bash", "-c", "echo it ran")
    assert done.returncode == 0
    assert "head looks for it" not in done.stdout
    assert "it ran" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("/x/bin/ray job submit -- python jobs/train.py", "pipeline.cluster.submit.from_ray"),
        ("/x/bin/ray start --head", "None"),  # its children may be of other environments
        ("/x/bin/u2pl job submit", "None"),
        ("", "None"),
    ],
)
def test_the_hook_is_set_for_ray_job_submit_alone(words: str, told: str) -> None:
    (line,) = (ROOT / "pipeline" / "u2pl_ray.pth").read_text().splitlines()
    code = f"import sys; sys.orig_argv = sys.argv; {line}; print(os.environ.get('RAY_JOB_SUBMIT_HOOK'))"
    clean = {name: value for name, value in os.environ.items() if name != "RAY_JOB_SUBMIT_HOOK"}
    done = subprocess.run([sys.executable, "-c", code, *words.split()], env=clean, capture_output=True, text=True)
    assert done.stdout == f"{told}\n"


def test_without_a_checkout_the_installed_package_is_sent(head: Head, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pipeline", tmp_path / "site" / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "site" / "pipeline" / "here.txt").touch()

    def send(*command: str) -> subprocess.CompletedProcess:
        arguments = [sys.executable, "-m", "pipeline", "submit", "--address", head.url, "--", *command]
        values = {**head.environment, "PYTHONPATH": str(tmp_path / "site")}
        return subprocess.run(arguments, cwd=tmp_path, env=values, capture_output=True, text=True, timeout=300)

    done = send("train", "--nonsense")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "u2pl train: unknown argument '--nonsense'" in done.stdout
    here = "import os, pipeline; print(os.path.exists(os.path.dirname(pipeline.__file__) + '/here.txt'))"
    assert send("python", "-c", here).stdout.splitlines()[-1] == "True"
    done = send("jobs/train.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert "jobs/train.py belongs to a checkout, and this package is installed: say -- train" in done.stderr


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
    assert "'./pipeline/config/presets'" in folders
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


def test_no_command_given_is_one_line(head: Head) -> None:
    done = submitted(head)
    assert done.returncode == 2
    assert "no command given" in done.stderr


@pytest.mark.parametrize("flags", [["--config", "mine.yaml"], ["--config=mine.yaml"]])
def test_a_config_of_this_machine_is_one_line(head: Head, flags: list[str]) -> None:
    done = submitted(head, "jobs/train.py", *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--config mine.yaml: is not sent to the cluster" in line


def test_interrupting_leaves_the_job_running_and_says_so(head: Head, tmp_path: Path) -> None:
    mark, release = tmp_path / "finished", tmp_path / "release"
    script = (
        "import time, pathlib; print('going', flush=True)\n"
        f"while not pathlib.Path({str(release)!r}).exists(): time.sleep(0.2)\n"
        f"pathlib.Path({str(mark)!r}).touch()"
    )
    arguments = [sys.executable, "jobs/submit.py", "--address", head.url, "--", "python", "-c", script]
    with Job(arguments, head.environment, tmp_path / "log") as job:
        wait_for("its first line", lambda: "\ngoing" in job.said)
        os.kill(job.pid, signal.SIGINT)
        assert job.wait(60) == 130
        assert "the job goes on; follow it with `ray job logs --follow raysubmit_" in job.said
        assert "Traceback" not in job.said
        release.touch()
        wait_for("the job itself", mark.exists)


def test_a_head_without_the_environment_that_then_dies(ray_folder: str, tmp_path: Path) -> None:
    programs = tmp_path / "bin"  # a shell and what it needs, and no Python
    programs.mkdir()
    for name in ("sh", "bash", "sleep", "env"):
        (programs / name).symlink_to(str(shutil.which(name)))
    with Head(ray_folder, PATH=str(programs)) as own:
        done = submitted(own, "jobs/train.py")
        assert done.returncode == 127, done.stdout + done.stderr
        assert "the head has no `python` on its PATH: activate the environment there" in done.stderr
        script = "echo going; sleep 300"
        arguments = [sys.executable, "jobs/submit.py", "--address", own.url, "--", "bash", "-c", script]
        with Job(arguments, own.environment, tmp_path / "log") as job:
            wait_for("its first line", lambda: "\ngoing" in job.said)
            own.__exit__()
            assert job.wait(120) == 1
            assert "submit.py: lost the cluster while following raysubmit_" in job.said.splitlines()[-1]
            assert "Traceback" not in job.said
