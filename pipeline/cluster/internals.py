"""Every private part of Ray that this package uses, and what for: a new release of Ray may move any of them.

Imported late, as Ray reads its settings when it is imported. `tests/unit/cluster/test_internals.py` names what is gone.
"""

from typing import Any

from ray._private.state import state
from ray.core.generated import autoscaler_pb2
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

__all__ = [
    "ElasticScalingPolicy",
    "NoopDecision",
    "ScalingDecision",
    "WorkerGroupPollStatus",
    "WorkerGroupState",
    "cluster_status",
    "draining_nodes",
]


def draining_nodes() -> dict[str, Any]:
    """The nodes that are about to be taken away, by id: Ray has no public way to them."""
    found: dict[str, Any] = state.get_draining_nodes()
    return found


def cluster_status() -> Any:
    """Ray's GetClusterStatusReply, which says what an autoscaler cannot start: Ray has no public way to it.

    Without an autoscaler, or with Ray's first one, `autoscaling_state` is empty.
    """
    client: Any = internal_kv_get_gcs_client()
    reply: Any = autoscaler_pb2.GetClusterStatusReply  # type: ignore[attr-defined]
    return reply.FromString(client.get_cluster_status())
