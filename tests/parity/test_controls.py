"""Controls of the comparison: with its unlabeled side switched off, a method scores as SupOnly does.

Whole runs of the demo, three seeds each: `pytest -m controls`, about an hour and a half on one core, at night.
What one step shows of it is in tests/unit/methods/test_methods.py.
"""

import statistics
from pathlib import Path

import pytest

from pipeline.config.schema import Config
from pipeline.methods import make_config
from pipeline.training import trainer
from pipeline.training.runtime import PlainRuntime
from tests.controls import OFF

SEEDS = (0, 1, 2)
NOISE = 1.5
"""Points of mIoU. SupOnly's seeds differ by half a point; passes of other images take dropout's numbers before it."""

pytestmark = pytest.mark.controls


def _score(shapes: str, out: Path, method: str, seed: int, options: dict[str, object]) -> float:
    """Val mIoU in % at the end of a run on 50 labeled images: of the student, which a teacher follows late."""
    values = {
        **{"method": method, "seed": seed, "split": "1_8", "out": str(out / f"{method}-{seed}")},
        **{"data": {"root": shapes}, "run": {"tensorboard": False}, method: options},
    }
    config: Config = make_config({key: value for key, value in values.items() if value != {}}, preset="demo")
    last = trainer.train(config, PlainRuntime(str(config.out))).last
    assert last is not None
    return 100 * last.miou.get("student", last.value)


@pytest.fixture(scope="module")
def suponly(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    out = tmp_path_factory.mktemp("suponly")
    return [_score(shapes, out, "suponly", seed, {}) for seed in SEEDS]


@pytest.mark.parametrize("name", OFF)
def test_without_its_unlabeled_side_a_method_scores_as_suponly(name, shapes, suponly, tmp_path):
    options = {**OFF[name], "batch_norm": "separate"}
    scores = [_score(shapes, tmp_path, name, seed, options) for seed in SEEDS]
    assert statistics.mean(scores) == pytest.approx(statistics.mean(suponly), abs=NOISE), (scores, suponly)
