"""Every private part of Ray that this package uses, and what for: a new release of Ray may move any of them.

Imported late, as Ray reads its settings when it is imported. `tests/unit/cluster/test_internals.py` names what is gone.
"""

from collections.abc import Mapping
from typing import Any

from ray._private.state import actors, state
from ray.core.generated import autoscaler_pb2
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from ray.train._internal.utils import get_address_and_port
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import placement_group_cleaner
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

__all__ = [
    "DataParallelTrainer",
    "DatasetsCallback",
    "ElasticScalingPolicy",
    "EndingCleaner",
    "EndingCleanerCallback",
    "NoopDecision",
    "PlacementGroupCleanerCallback",
    "ScalingDecision",
    "WorkerGroupPollStatus",
    "WorkerGroupState",
    "checkpoint_record",
    "cluster_status",
    "draining_nodes",
    "get_address_and_port",
    "preemption",
]


class EndingCleaner(PlacementGroupCleaner):
    """Ray's detached actor on the head that frees the workers' place once the controller of a run is gone, and ends.

    Ray's own has two ways to stay on the head for ever, with 200 MB. It looks for the controller once the controller
    asks it to, and one that has gone before that, as the actor takes seconds to start, never asks. And it looks by the
    State API, which searches this machine for a cluster and gives up where there are two.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        setattr(placement_group_cleaner, "is_actor_alive", _is_alive)  # noqa: B010  this process is the actor's alone
        self.start_monitoring()


def _is_alive(actor_id: str, timeout: float) -> bool:
    """Whether this cluster has the actor; its control store is asked, which answers or ends this process too."""
    found = actors(actor_id)
    return bool(found) and found["State"] != "DEAD"


class EndingCleanerCallback(PlacementGroupCleanerCallback):
    """Ray's callback of a controller, with a cleaner that ends."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Starts the cleaner; called in the controller's process, which is this run's alone."""
        setattr(placement_group_callback, "PlacementGroupCleaner", EndingCleaner)  # noqa: B010
        super().after_controller_start(train_run_context)


def draining_nodes() -> dict[str, Any]:
    """The nodes that are about to be taken away, by id: Ray has no public way to them."""
    found: dict[str, Any] = state.get_draining_nodes()
    return found


def preemption() -> Any:
    """Ray's PreemptionInfo as this worker of Ray Train knows it, or None; the public way is a barrier of workers."""
    return get_train_context().preemption_context.preemption_info


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
