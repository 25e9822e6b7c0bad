"""Every private part of Ray that this package uses, and what for: a new release of Ray may move any of them.

Imported late, as Ray reads its settings when it is imported. `tests/unit/cluster/test_internals.py` names what is gone.
"""

from collections.abc import Mapping
from typing import Any

from ray._private.state import state
from ray.core.generated import autoscaler_pb2
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

__all__ = [
    "ElasticScalingPolicy",
    "NoopDecision",
    "ScalingDecision",
    "WorkerGroupPollStatus",
    "WorkerGroupState",
    "checkpoint_record",
    "cluster_status",
    "draining_nodes",
]


def draining_nodes() -> dict[str, Any]:
    """The nodes that are about to be taken away, by id: Ray has no public way to them."""
    found: dict[str, Any] = state.get_draining_nodes()
    return found


def checkpoint_record(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """What Ray Train writes beside its checkpoints, and reads when a run is started again.

    Args:
        metrics: `step` and `score` by the checkpoint's name, at least one; the newest comes last.
    """
    results = {
        name: _TrainingResultState(checkpoint_dir_name=name, metrics=dict(each)) for name, each in metrics.items()
    }
    order = sorted(enumerate(results), key=lambda each: (metrics[each[1]]["score"], each[0]))  # Ray's: the best last
    return _CheckpointManagerState(
        checkpoint_results=[results[name] for _, name in order],
        checkpoint_report_indices=[index for index, _ in order],
        latest_checkpoint_result=results[list(results)[-1]],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(results),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    ).json()


def cluster_status() -> Any:
    """Ray's GetClusterStatusReply, which says what an autoscaler cannot start: Ray has no public way to it.

    Without an autoscaler, or with Ray's first one, `autoscaling_state` is empty.
    """
    client: Any = internal_kv_get_gcs_client()
    reply: Any = autoscaler_pb2.GetClusterStatusReply  # type: ignore[attr-defined]
    return reply.FromString(client.get_cluster_status())
