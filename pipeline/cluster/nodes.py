"""The nodes of the connected cluster: what they have, how many workers they hold, and starting more of them."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

NODE_GROUP = "ray.io/node-group"
"""Label of a node that was started as one of a group."""
ASK_SECONDS = 5.0
"""Seconds between two requests to an autoscaler."""
FIRST_WORD_SECONDS = 60.0
"""Seconds to wait for an autoscaler's first report. Without one by then, there is no autoscaler."""
EPSILON = 1e-6
"""Added before a quotient is rounded down, so that 1 CPU holds ten workers of 0.1."""


class Machine(NamedTuple):
    """The resources of one node."""

    cpus: float
    gpus: float


def machines() -> list[Machine]:
    """The nodes that are up, without those that are about to be taken away."""
    import ray

    from pipeline.cluster import internals

    leaving = internals.draining_nodes()
    up = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return [Machine(found.get("CPU", 0.0), found.get("GPU", 0.0)) for found in up]


def grows() -> bool:
    """Whether an autoscaler starts more nodes on request: those of `ray up` and KubeRay belong to named node groups.

    If such a cluster has no CPUs yet, it may be just starting, and its autoscaler gets time to report.
    """
    import ray

    if not any(NODE_GROUP in node["Labels"] for node in ray.nodes() if node["Alive"]):
        return False
    until = time.monotonic() + FIRST_WORD_SECONDS
    while not (speaks := _autoscaler_speaks()) and time.monotonic() < until:
        if any(machine.cpus for machine in machines()):
            break
        time.sleep(1)
    return speaks


def _autoscaler_speaks() -> bool:
    from pipeline.cluster.internals import cluster_status

    return bool(cluster_status().autoscaling_state.autoscaler_state_version)


def start_nodes(bundles: Sequence[Mapping[str, float]]) -> None:
    """Makes the autoscaler start nodes until the cluster holds all `bundles` at once, and releases them again.

    An autoscaler starts nodes for requests that wait. This one gives up if the bundles cannot be had although nobody
    else holds or requests resources.

    Args:
        bundles: resources by Ray's names, each on one node.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    wanted = placement_group([dict(bundle) for bundle in bundles])
    try:
        while not wanted.wait(ASK_SECONDS) and not _hopeless(wanted.id.hex()):
            pass
    finally:
        remove_placement_group(wanted)


def _hopeless(group: str) -> bool:
    """Whether a placement group can never be placed: not even when all others have released what they hold."""
    from pipeline.cluster.internals import cluster_status

    status = cluster_status()
    if not any(group in each.details for each in status.autoscaling_state.infeasible_gang_resource_requests):
        return False
    state = status.cluster_resource_state
    others = any(group not in each.details for each in state.pending_gang_resource_requests)
    taken = any(
        node.available_resources.get(name, 0.0) < node.total_resources[name]
        for node in state.node_states
        for name in ("CPU", "GPU")
        if name in node.total_resources
    )
    return not others and not taken


class Workers(NamedTuple):
    """The workers of a run."""

    counts: tuple[int, ...]
    """Numbers of workers that may run, ascending; a single one never changes."""
    cpus: float
    """CPUs of each worker."""
    gpus: float
    """GPUs of each worker, or a share of one; 0: none."""
    spare_cpus: float
    """CPUs that one node must keep free beside its workers."""

    @property
    def most(self) -> int:
        """The largest of the numbers."""
        return self.counts[-1]

    @property
    def resources(self) -> dict[str, float]:
        """Resources of each worker, by Ray's names."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def places(machines: Sequence[Machine], workers: Workers) -> int:
    """How many workers fit the nodes if one node keeps the spare CPUs free."""

    def held(machine: Machine, spare: float = 0.0) -> int:
        by_cpus = (machine.cpus - spare) / workers.cpus
        return max(0, int((min(by_cpus, machine.gpus / workers.gpus) if workers.gpus else by_cpus) + EPSILON))

    able = [machine for machine in machines if machine.cpus >= workers.spare_cpus]
    given_up = min((held(machine) - held(machine, workers.spare_cpus) for machine in able), default=0)
    return max(0, sum(map(held, machines)) - given_up)


def gpu_slots(machines: Sequence[Machine], share: float) -> int:
    """How many workers fit the GPUs of the nodes, each with that share of one."""
    return sum(int(machine.gpus / share + EPSILON) for machine in machines)
