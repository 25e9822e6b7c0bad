"""The nodes of the connected cluster: what they have, how many workers they hold, and starting more of them."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

NODE_GROUP = "ray.io/node-group"
"""Label of a node that was started as one of a group."""
ASK_SECONDS = 5.0
"""Between two questions to an autoscaler."""
FIRST_WORD_SECONDS = 60.0
"""After which an autoscaler that has said nothing is none."""
EPSILON = 1e-6
"""For whole parts of quotients: 1 / 0.1 workers are ten."""


class Machine(NamedTuple):
    """What a node has for tasks and workers."""

    cpus: float
    gpus: float


def machines() -> list[Machine]:
    """The nodes that are up and stay."""
    import ray

    from pipeline.cluster import internals

    leaving = internals.draining_nodes()
    up = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return [Machine(found.get("CPU", 0.0), found.get("GPU", 0.0)) for found in up]


def grows() -> bool:
    """Whether nodes are of named groups (`ray up`, KubeRay) and an autoscaler starts more of them when asked for.

    A cluster of groups that has nothing to work with may be just starting: its autoscaler is given time to speak.
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
    """Waits until a cluster that grows holds resources all at one time; they are free again afterwards.

    What waits for resources is what makes an autoscaler start nodes. Gives up if they cannot be had though nobody else
    has or wants any.

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
    """Whether a placement group can never be had; what others have now is not there either, but comes back."""
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
    """Of each."""
    gpus: float
    """Of each; 0: none."""
    spare_cpus: float
    """That one node must keep beside them."""

    @property
    def most(self) -> int:
        """How many run when nothing is missing."""
        return self.counts[-1]

    @property
    def resources(self) -> dict[str, float]:
        """Of each, by Ray's names."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def places(machines: Sequence[Machine], workers: Workers) -> int:
    """How many workers the nodes hold while one of them keeps the spare CPUs."""

    def held(machine: Machine, spare: float = 0.0) -> int:
        by_cpus = (machine.cpus - spare) / workers.cpus
        return max(0, int((min(by_cpus, machine.gpus / workers.gpus) if workers.gpus else by_cpus) + EPSILON))

    able = [machine for machine in machines if machine.cpus >= workers.spare_cpus]
    given_up = min((held(machine) - held(machine, workers.spare_cpus) for machine in able), default=0)
    return max(0, sum(map(held, machines)) - given_up)


def gpu_slots(machines: Sequence[Machine], share: float) -> int:
    """How many workers with a share of a GPU each the nodes hold."""
    return sum(int(machine.gpus / share + EPSILON) for machine in machines)
