"""The spot watcher against a metadata service over HTTP, on a real Ray node."""

import json
import subprocess
import sys
import time

from cluster import spot_watcher
from tests.heads import Head
from tests.jobs import ROOT
from tests.processes import wait_for
from tests.unit.cluster_files.metadata import Metadata
from tests.unit.cluster_files.test_spot_watcher import ACTION, SCRIPT, interruption


def test_a_real_node_is_draining_afterwards(ray_folder: str) -> None:
    with Metadata() as metadata, Head(ray_folder) as head:
        folder = head.add_node("worker")
        (node, gcs) = wait_for("the node", lambda: spot_watcher.raylets(temp_dir=folder))[0]
        assert gcs.endswith(head.gcs.rpartition(":")[2])
        with subprocess.Popen(
            [sys.executable, "-c", WORK, head.gcs, node], env=head.environment, stdout=subprocess.PIPE, text=True
        ) as work:
            assert work.stdout is not None
            assert work.stdout.readline() == "busy\n"  # an idle node may be gone before anyone looks
            metadata.answers[ACTION] = interruption(100)
            command = [*SCRIPT, "--cloud", "aws", "--metadata-url", metadata.url, "--temp-dir", folder]
            done = subprocess.run(command, cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=180)
            assert done.returncode == 0, done.stderr
            ((drained, deadline),) = json.loads(work.stdout.readline()).items()
        assert drained == node
        assert deadline / 1000 - time.time() <= 90


WORK = """
import json, sys, time, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(address=sys.argv[1], log_to_driver=False)
deadline = time.time() + 180
while not any(node["Alive"] and node["NodeID"] == sys.argv[2] for node in ray.nodes()):  # its process came first
    assert time.time() < deadline, "the node has not joined"
    time.sleep(0.1)

@ray.remote(num_cpus=1)
class Work:
    def start(self):
        return "busy"

work = Work.options(scheduling_strategy=NodeAffinitySchedulingStrategy(sys.argv[2], soft=False)).remote()
print(ray.get(work.start.remote()), flush=True)
while not (found := ray._private.state.state.get_draining_nodes()) and time.time() < deadline:
    time.sleep(0.2)
print(json.dumps(found), flush=True)
"""
"""Keeps a node busy, and tells what Ray Train's workers are told: deadlines (ms) by node that is draining."""
