"""What is taken from the inside of Ray Train is still there; how it works, tests/integration/test_scaling.py shows."""

import inspect

import pytest
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from pipeline.training.elastic import SharesPolicy, Trainer


@pytest.mark.parametrize(("ours", "theirs"), [(Trainer, TorchTrainer), (SharesPolicy, ElasticScalingPolicy)])
def test_each_method_replaces_one_of_rays(ours: type, theirs: type) -> None:
    methods = [name for name, member in vars(ours).items() if inspect.isfunction(member)]
    assert methods
    assert [name for name in methods if not hasattr(theirs, name)] == []
