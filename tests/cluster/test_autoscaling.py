"""The node types of cluster/aws.yaml under Ray's own autoscaler, with make-believe machines: 0, 2, and 0 again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

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
import sys, time, ray
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)

@ray.remote(num_gpus=4)
def hold():
    return ray.get_runtime_context().get_node_id()

def gpus():
    print("gpus", int(ray.cluster_resources().get("GPU", 0)), flush=True)

gpus()
print("used", len(set(ray.get([hold.remote(), hold.remote()]))), flush=True)
for _ in sys.stdin:
    gpus()
"""


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Host]:
    """A head that starts and ends nodes as the file says."""
    with Network(tmp_path, {**ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}) as network:
        host = network.host("head", visible=[BIN.parent])
        host.write("/tmp/home/aws.yaml", yaml.safe_dump(faked()))
        yield host


def faked() -> dict:
    """The project's file with what makes machines replaced, and a short idle time; types and limits are its own."""
    config = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    types = config["available_node_types"]
    types["ray.head.default"] = types.pop(config["head_node_type"])  # a name that the fake provider insists on
    kept = {key: config[key] for key in ("cluster_name", "max_workers")}
    return {
        **kept, "available_node_types": types, "head_node_type": "ray.head.default", "provider": FAKE,
        "idle_timeout_minutes": IDLE_MINUTES, "file_mounts": {}, "auth": {}, "docker": {},
    }  # fmt: skip


def test_from_none_to_two_and_back(head: Host, tmp_path: Path) -> None:
    start = ("ray", "start", "--head", "--port=6379", f"--node-ip-address={head.address}", "--num-cpus=0")
    start += ("--object-store-memory=100000000", "--autoscaling-config=/tmp/home/aws.yaml", "--disable-usage-stats")
    head.run("env", *(f"{key}={value}" for key, value in AUTOSCALER.items()), *start)
    demand = head.start("python", "-c", DEMAND)
    assert demand.stdin is not None
    assert demand.stdout is not None
    assert demand.stdout.readline() == "gpus 0\n"
    assert demand.stdout.readline() == "used 2\n"  # two tasks that need a whole machine each

    def gpus() -> int:
        assert demand.stdout is not None
        print(file=demand.stdin, flush=True)
        return int(demand.stdout.readline().split()[1])

    wait_for("the nodes to go when idle", lambda: gpus() == 0, 180)
