import pytest
import torch

from benchmarks.device_step import case, trace
from pipeline.config.schema import Config
from pipeline.training import memory
from pipeline.training.memory import GIB, Weighing, estimate, needed

FP32 = {"run.precision": "fp32"}
SMALL = {"model.backbone": "resnet18", "data.crop": [129, 129], **FP32}


def _case(method: str = "u2pl", **values: object) -> Config:
    return case(method, "voc_classic", **SMALL, **values)


def test_what_lives_is_weighed_and_what_is_freed_is_not():
    with Weighing() as weighing:
        one = torch.zeros(100)
        view = one.view(10, 10)[1:]
        for _ in range(5):
            torch.ones(50)
        two = view.sum(0)
    assert weighing.most == 4 * 150
    del one, two


@pytest.mark.parametrize("method", ["suponly", "u2pl"])
def test_a_step_needs_what_it_owns_and_what_backward_needs(method):
    """The second is counted on the graph by `trace`; both fall with the images of a worker."""
    config = _case(method)
    one, four = (needed(config, 21, workers) for workers in (1, 4))
    kept = [trace(config, 21, workers)[0].saved for workers in (1, 4)]
    assert one - four == pytest.approx(kept[0] - kept[1], rel=0.15)
    assert one > kept[0]


@pytest.mark.parametrize(
    ("key", "value", "share"),
    [("run.precision", "bf16", 0.55), ("optim.accumulate", 4, 0.3), ("model.checkpoint_activations", True, 0.47)],
)
def test_what_lowers_it(key, value, share):
    values = {"model.backbone": "resnet50", **FP32}
    less = needed(case("suponly", "voc_classic", **{**values, key: value}), 21, 1)
    assert less == pytest.approx(share * needed(case("suponly", "voc_classic", **values), 21, 1), rel=0.1)


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 GiB, and 64 for the images."""

    def pretended(config: Config, classes: int, workers: int) -> int:
        parts = workers * config.optim.accumulate * (2 if config.run.precision == "bf16" else 1)
        return (4 + 64 // parts // (2 if config.model.checkpoint_activations else 1)) * GIB

    monkeypatch.setattr(memory, "needed", pretended)


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize(
    ("held", "end"),
    [
        (None, "on each worker"),
        (80, "on each worker"),
        (40, "; its GPU has 40: use --scaling.workers 2 or --run.precision bf16 or --model.checkpoint_activations true "
             "or --optim.accumulate 2"),
        (20, "; its GPU has 20: use --scaling.workers 4 or --optim.accumulate 4"),
        (4, "; its GPU has 4: use a smaller batch, crop or backbone"),
    ],
)  # fmt: skip
def test_a_gpu_that_is_too_small_is_told_with_what_helps(held, end):
    said = estimate(_case(), 21, 1, None if held is None else held * GIB)
    assert said.startswith("a step needs about 68 GiB of memory on each worker")
    assert said.endswith(end)


def test_the_random_numbers_of_the_run_stay():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    needed(_case("suponly", **{"optim.accumulate": 2}), 21, 4)
    assert torch.equal(torch.rand(1), expected)
