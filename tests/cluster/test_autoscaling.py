"""The node types of cluster/aws.yaml under Ray's own autoscaler, with make-believe machines: 0, 2, and 0 again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from tests.cluster.site import BIN, ENVIRONMENT, ROOT
from tests.hosts import Host, Network
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


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Host]:
    """A head that starts and ends nodes as the file says."""
    with Network(tmp_path, {**ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}) as network:
        host = network.host("head", visible=[BIN.parent])
        host.write("/tmp/home/aws.yaml", yaml.safe_dump(faked()))
        yield host


def faked() -> dict:
    """The project's file as Ray completes it, with another maker of machines and a short idle time."""
    config = prepare_config(yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text()))
    types = config["available_node_types"]
    types["ray.head.default"] = types.pop(config["head_node_type"])  # a name that the fake provider insists on
    changes = {"provider": FAKE, "idle_timeout_minutes": IDLE_MINUTES, "file_mounts": {}, "docker": {}}
    return {**config, "head_node_type": "ray.head.default", **changes}


def test_from_none_to_two_and_back(head: Host, tmp_path: Path) -> None:
    start = ("ray", "start", "--head", "--port=6379", f"--node-ip-address={head.address}", "--num-cpus=0")
    start += ("--object-store-memory=100000000", "--autoscaling-config=/tmp/home/aws.yaml", "--disable-usage-stats")
    head.run("env", *(f"{key}={value}" for key, value in AUTOSCALER.items()), *start)
    log = tmp_path / "log"
    demand = head.start("python", "-c", DEMAND, log=log)
    wait_for("nodes that come and go", lambda: demand.poll() is not None, 400)
    assert log.read_text().splitlines()[-3:] == ["gpus before 0", "nodes used 2 gpus 8", "gpus after 0"]
