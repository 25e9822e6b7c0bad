"""The node types of cluster/aws.yaml under Ray's own autoscaler, with make-believe machines: 0, 2, and 0 again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from tests.cluster.site import BIN, ENVIRONMENT, ROOT
from tests.hosts import Host, Network
from tests.jobs import SHORT
from tests.processes import wait_for

HEAD = "f" * 51 + "00000"
"""The fake provider's id of the head."""
FAKE = {
    "type": "external",
    "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
    "use_node_id_as_ip": True,
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
}
AUTOSCALER = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
    "RAY_CLOUD_INSTANCE_ID": HEAD,
    "RAY_NODE_TYPE_NAME": "ray.head.default",  # as `ray up` sets it
}
IDLE_MINUTES = 0.1
DEMAND = """
import time, ray
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
gpus = lambda: int(ray.cluster_resources().get("GPU", 0))

@ray.remote(num_gpus=4)
def hold(meeting):
    ray.get(meeting.come.remote())
    return ray.get_runtime_context().get_node_id()

@ray.remote(num_cpus=0, max_concurrency=2)
class Meeting:
    def __init__(self):
        import threading
        self._both = threading.Barrier(2)
    def come(self):
        self._both.wait()

print("gpus before", gpus(), flush=True)
meeting = Meeting.remote()
used = ray.get([hold.remote(meeting), hold.remote(meeting)])
print("nodes used", len(set(used)), "gpus", gpus(), flush=True)
while gpus():
    time.sleep(0.5)
print("gpus after 0", flush=True)
"""
"""Two tasks that each need all GPUs of a machine, and wait for each other."""
ASK = """
import threading
import ray
from pipeline import cli, cluster
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.training.scaling import workers_of

def ask(*flags):
    try:
        workers = workers_of(cli.parse_config(["--preset", "demo", *flags], "", OPTIONS)[0])
        print("got", workers.counts, workers.resources, flush=True)
    except UserError as error:
        print("refused:", error, flush=True)

cluster.connect()
ask()
ask("--scaling.workers", "2..4")

class Other:
    def ready(self):
        return True

other = ray.remote(num_gpus=4)(Other).remote()
ray.get(other.ready.remote())
many = ("--scaling.workers", "64", "--optim.batch_labeled", "64", "--optim.batch_unlabeled", "128")
asking = threading.Thread(target=ask, args=many)
asking.start()
asking.join(20)
print("waits while others work", asking.is_alive(), flush=True)
ray.kill(other)
asking.join()
"""
"""What runs ask for: without a number, 2 or 4 GPUs, and more than the file allows, while others have some and then not.

Ray calls infeasible what does not fit beside others.
"""


@pytest.fixture
def head(tmp_path: Path, shapes: str) -> Iterator[Host]:
    """A head that starts and ends nodes as the file says."""
    with Network(tmp_path, {**ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}) as network:
        host = network.host("head", visible=[BIN.parent, ROOT, Path(shapes)])
        host.write("/tmp/home/aws.yaml", yaml.safe_dump(faked()))
        start = ("ray", "start", "--head", "--port=6379", f"--node-ip-address={host.address}", "--num-cpus=0")
        start += ("--object-store-memory=100000000", "--autoscaling-config=/tmp/home/aws.yaml", "--disable-usage-stats")
        host.run("env", *(f"{key}={value}" for key, value in AUTOSCALER.items()), *start)
        yield host


def faked() -> dict:
    """The project's file as Ray completes it, with another maker of machines and a short idle time."""
    config = prepare_config(yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text()))
    types = config["available_node_types"]
    types["ray.head.default"] = types.pop(config["head_node_type"])  # a name that the fake provider insists on
    changes = {"provider": FAKE, "idle_timeout_minutes": IDLE_MINUTES, "file_mounts": {}, "docker": {}}
    return {**config, "head_node_type": "ray.head.default", **changes}


def test_from_none_to_two_and_back(head: Host, tmp_path: Path) -> None:
    log = tmp_path / "log"
    demand = head.start("python", "-c", DEMAND, log=log)
    wait_for("nodes that come and go", lambda: demand.poll() is not None, 400)
    assert log.read_text().splitlines()[-3:] == ["gpus before 0", "nodes used 2 gpus 8", "gpus after 0"]


def test_a_run_asks_for_its_nodes(head: Host, tmp_path: Path) -> None:
    log = tmp_path / "log"
    asking = head.start("python", "-c", ASK, log=log, cwd=str(ROOT), PYTHONPATH=str(ROOT))
    wait_for("the answers", lambda: asking.poll() is not None, 400)
    refused, waiting, got, more, busy, never = log.read_text().splitlines()[-6:]
    assert refused.startswith("refused: the cluster has no GPU yet and starts nodes when they are asked for")
    assert waiting == "waiting for nodes: 2 workers need 2 GPUs"
    assert got == "got (2, 4) {'CPU': 4.0, 'GPU': 1.0}"
    assert more == "waiting for nodes: 64 workers need 64 GPUs"
    assert busy == "waits while others work True"
    assert never.startswith("refused: scaling.workers 64: the cluster has 4 GPUs and cannot get so many")


def test_a_training_on_a_cluster_without_a_node(head: Host, shapes: str, tmp_path: Path) -> None:
    """On CPUs, as these machines have no real GPUs."""
    flags = ["--data", shapes, "--out", "/tmp/run", "--optim.steps", "10"]
    flags += ["--scaling.workers", "2", "--scaling.gpus_per_worker", "0"]
    log = tmp_path / "log"
    job = head.start("python", "jobs/train.py", *SHORT, *flags, log=log, cwd=str(ROOT))
    wait_for("the training", lambda: job.poll() is not None, 400)
    assert job.returncode == 0, log.read_text()
    assert "waiting for nodes: 2 workers need 1.25 CPUs" in log.read_text()
    assert head.run("ls", "/tmp/run/step_0000010").stdout.split() == ["checkpoint.json", "state.pt"]
