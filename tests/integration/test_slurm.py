"""slurm.sbatch with stand-ins for SLURM's programs and a real Ray."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.cluster_rules import CLUSTER
from tests.jobs import Job
from tests.processes import wait_for

SCRIPT = CLUSTER / "slurm.sbatch"
SRUN = r"""#!/bin/bash
# Runs the command here, as the one node's only task.
while [[ $1 == --* ]]; do printf '%s ' "$1" >>"$0.calls"; shift; done
printf '%s\n' "$1 $2" >>"$0.calls"
exec "$@"
"""
SCONTROL = """#!/bin/bash
printf '%s\\n' "$*" >>"$0.calls"
if [ "$1" = show ]; then echo localhost; else echo "scontrol $*"; fi
"""
JOB = """
import os, signal, stat, sys, time, ray
def end(*_):
    print("SIGTERM: a checkpoint", flush=True)
    time.sleep(1)
    print("the checkpoint is whole", flush=True)
    sys.exit(143)
path = os.environ["RAY_AUTH_TOKEN_PATH"]
print("token", oct(stat.S_IMODE(os.stat(path).st_mode)), len(open(path).read()), flush=True)
ray.init(log_to_driver=False)
signal.signal(signal.SIGTERM, end)
print("flags", sys.argv[1:], "nodes", len(ray.nodes()), "cpus", ray.cluster_resources()["CPU"], flush=True)
time.sleep(float(os.environ.get("HOLD", "0")))
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project's root with a job that tells what it finds, and SLURM's programs."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "train.py").write_text(JOB)
    (tmp_path / "cluster").symlink_to(CLUSTER)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "hostname": "#!/bin/sh\necho 127.0.0.1\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return tmp_path


def environment(project: Path, ray_folder: str, **more: str) -> dict[str, str]:
    slurm = {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost",
             "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_TMPDIR": ray_folder}  # fmt: skip
    path = f"{project}/bin{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "HOME": str(project), "PATH": path, **slurm, **more}


def test_it_trains_on_a_cluster_with_a_token_and_leaves_nothing(project: Path, ray_folder: str, tmp_path: Path) -> None:
    values = environment(project, ray_folder, CODE="3")
    with Job(["bash", str(SCRIPT), "--split", "1_2"], values, tmp_path / "log") as job:
        code = job.wait(600)
        assert code == 3, job.said  # the training's own
    assert "token 0o600 64" in job.said
    assert "flags ['--split', '1_2'] nodes 2 cpus 1.0" in job.said
    assert list(project.glob(".u2pl-ray-token*")) == []
    wait_for("Ray's end", lambda: not running(ray_folder), 60)
    calls = (project / "bin" / "srun.calls").read_text().splitlines()
    assert len([call for call in calls if "--nodes=1 " in call and call.endswith("ray start")]) == 2


def test_before_its_time_is_over_it_queues_again(project: Path, ray_folder: str, tmp_path: Path) -> None:
    with Job(["bash", str(SCRIPT)], environment(project, ray_folder, HOLD="300"), tmp_path / "log") as job:
        wait_for("the training", lambda: trains(job), 600)
        os.kill(job.pid, 10)  # USR1, as --signal=B:USR1@120 sends it
        assert job.wait(180) != 0
    order = ["SIGTERM: a checkpoint", "the checkpoint is whole", f"scontrol requeue {os.getpid()}"]
    assert [line for line in job.said.splitlines() if line in order] == order


@pytest.mark.night
def test_a_ray_node_that_ends_makes_it_queue_again(project: Path, ray_folder: str, tmp_path: Path) -> None:
    with Job(["bash", str(SCRIPT)], environment(project, ray_folder, HOLD="300"), tmp_path / "log") as job:
        wait_for("the training", lambda: trains(job), 600)
        (node,) = [pid for pid in running(f"--temp_dir={ray_folder}/ray-{os.getpid()}\0") if "raylet" in name(pid)]
        os.kill(node, signal.SIGKILL)
        assert job.wait(180) != 0
    assert "a Ray node has ended: queueing again" in job.said
    assert f"requeue {os.getpid()}" in (project / "bin" / "scontrol.calls").read_text()
    assert list(project.glob(".u2pl-ray-token*")) == []
    assert not (Path(ray_folder) / f"ray-{os.getpid()}").exists()


def trains(job: Job) -> bool:
    assert "Traceback" not in job.said, job.said
    return "flags" in job.said


def name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()


def running(folder: str) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if folder in file.read_text(errors="replace"):
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found
