"""What this package takes from the inside of Ray is still there; how it works is shown by the integration tests."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import ray
from ray._private.state import GlobalState
from ray.train.v2._internal.execution.controller import placement_group_cleaner

from pipeline.cluster import internals
from pipeline.cluster.elastic import ElasticTrainer, SharesPolicy


def test_every_private_part_of_ray_is_there() -> None:
    tree = ast.parse(Path(inspect.getfile(internals)).read_text())
    taken = [
        (node.module, each.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ray.")
        for each in node.names
    ]
    assert len(taken) > 5
    gone = [f"{module}.{name}" for module, name in taken if not hasattr(importlib.import_module(module), name)]
    assert gone == [], f"Ray {ray.__version__} has moved them; see pipeline/cluster/internals.py"
    assert hasattr(GlobalState, "get_draining_nodes")
    assert [*inspect.signature(vars(placement_group_cleaner)["is_actor_alive"]).parameters] == ["actor_id", "timeout"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ElasticTrainer, internals.DataParallelTrainer),
        (SharesPolicy, internals.ElasticScalingPolicy),
        (internals.EndingCleaner, internals.PlacementGroupCleaner),
        (internals.EndingCleanerCallback, internals.PlacementGroupCleanerCallback),
    ],
)
def test_each_method_replaces_one_of_rays(ours: type, theirs: type) -> None:
    methods = [name for name, member in vars(ours).items() if inspect.isfunction(member)]
    assert methods
    assert [name for name in methods if not hasattr(theirs, name)] == []
