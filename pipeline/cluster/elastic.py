"""Ray Train with a number of workers that follows the cluster, among those that share the batch."""

import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import ScalingConfig

from pipeline.cluster import nodes
from pipeline.cluster.internals import (
    DataParallelTrainer,
    DatasetsCallback,
    ElasticScalingPolicy,
    EndingCleanerCallback,
    NoopDecision,
    PlacementGroupCleanerCallback,
    ScalingDecision,
    WorkerGroupPollStatus,
    WorkerGroupState,
    draining_nodes,
)
from pipeline.cluster.nodes import Machine, Workers, places
from pipeline.cluster.process_group import ProcessGroup

RESIZE_SECONDS = 30.0
"""Least time between two checks whether more workers fit: each change restarts all of them."""
ANSWER_SECONDS = 5.0


def scaling_config(workers: Workers) -> ScalingConfig:
    """Ray Train's own form of `Workers`."""
    return ScalingConfig(
        num_workers=workers.most if len(workers.counts) == 1 else (workers.counts[0], workers.most),
        use_gpu=workers.gpus > 0,
        resources_per_worker=workers.resources,
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


class ElasticTrainer(DataParallelTrainer):
    """Ray Train with torch, whose number of workers, where it may change, is always one that shares the batch."""

    def __init__(self, *args: Any, workers: Workers, **options: Any) -> None:
        """Args: workers: numbers and resources; the other arguments are those of Ray's trainer."""
        backend = ProcessGroup("nccl" if workers.gpus else "gloo")
        super().__init__(*args, backend_config=backend, scaling_config=scaling_config(workers), **options)
        self._workers = workers

    def _create_default_callbacks(self) -> list[Any]:
        """Leaves out that of Ray's `datasets=`, which is an actor: here each worker reads a plan of its own."""
        return [
            EndingCleanerCallback() if isinstance(each, PlacementGroupCleanerCallback) else each
            for each in super()._create_default_callbacks()
            if not isinstance(each, DatasetsCallback)
        ]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leaves Ctrl-C to `console.Console`; Ray's handler would end the run without a checkpoint."""

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if len(self._workers.counts) > 1:
            options["scaling_policy"] = SharesPolicy(self.scaling_config, self._workers)
        return super()._initialize_and_run_controller(**options)


class SharesPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy with four differences.

    - It allows only numbers of workers that divide the batch.
    - It leaves CPUs for reading.
    - It counts the nodes as they are now, without those that are about to be taken away. Ray's own count is up to 20 s
      old, which costs a start in vain.
    - It resizes a running group only right after a checkpoint, so that no step is repeated.
    """

    def __init__(self, scaling_config: ScalingConfig, workers: Workers) -> None:
        super().__init__(scaling_config)
        self._workers = workers

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Called at each poll of the workers."""
        reports = [status.training_report for status in worker_group_status.worker_statuses.values()]
        if not any(report and report.checkpoint for report in reports):
            self._maybe_send_resource_request()
            return NoopDecision()
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        leaving = draining_nodes()
        reserved = [
            Machine(found.get("CPU", 0.0), found.get("GPU", 0.0))
            for node, found in reserved_resources.items()
            if node not in leaving
        ]
        free = places(reserved, self._workers._replace(spare_cpus=0.0))
        room = min(free, places(nodes.machines(), self._workers))
        return max((count for count in self._workers.counts if count <= room), default=0)

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        now = time.monotonic()
        if now - self._latest_reserved_resources_query_time < self.GET_RESERVED_RESOURCES_INTERVAL_S:
            return self._latest_reserved_resources
        self._latest_reserved_resources_query_time, self._latest_reserved_resources = now, None
        coordinator: Any = self._autoscaling_coordinator
        answer = coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        try:
            self._latest_reserved_resources = ray.get(answer, timeout=ANSWER_SECONDS)
        except RayError:  # busy, or being started anew: the next look will tell
            return None
        return self._latest_reserved_resources
