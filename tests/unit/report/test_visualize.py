"""`u2pl visualize` on checkpoints of runs of a few steps; what its pictures say is tested with `look` and `plane`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import commands
from pipeline.config.cli import resolve
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.inference import plane
from pipeline.inference.evaluate import read_images, spread
from pipeline.inference.load import restore
from pipeline.inference.look import drawn, look
from pipeline.inference.plane import Points
from pipeline.methods import OPTIONS, Step
from pipeline.ops.world import World
from pipeline.report.visualize import drawn_plane
from pipeline.training.runtime import PlainRuntime
from pipeline.training.trainer import train

STEPS = 4


@pytest.fixture(scope="module")
def runs(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of U2PL and one of SupOnly, without pictures of their own."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("u2pl", "suponly"):
        values = {
            "method": method, "split": "1_4", "out": str(folder / method), "data": {"root": shapes, "crop": [32, 32]},
            "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8},
            "optim": {"steps": STEPS, "batch_labeled": 2, "batch_unlabeled": 2}, "eval": {"every": STEPS},
            "run": {"tensorboard": False, "pictures": 0},
        }  # fmt: skip
        if method == "u2pl":
            values["u2pl"] = {"warmup": 1, "anchors": 8, "negatives": 4, "keys": 8, "queue": 20, "queue_background": 20}
        train(resolve(values, OPTIONS), PlainRuntime(str(folder / method)))
    return folder


@pytest.fixture(autouse=True)
def _few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane, "PIXELS", 90)
    monkeypatch.setattr(plane, "KEYS", 30)


def _expected(run: Path, ids: list[str], index: int) -> np.ndarray:
    config, method = restore(str(run), torch.device("cpu"))
    dataset = open_dataset(str(config.data.root))
    step = Step(index, STEPS, config.seed, World())
    return np.asarray(drawn(look(method, read_images(dataset, ids), dataset, config, step, 512), dataset))


def _pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_named_images_as_the_method_sees_them_at_the_checkpoint(runs, shapes, tmp_path, capsys):
    ids = spread(open_dataset(shapes), 2)[::-1]
    commands.call("visualize", [str(runs / "u2pl"), "--out", str(tmp_path), "--images", *ids])
    assert (_pixels(tmp_path / "pictures.png") == _expected(runs / "u2pl", ids, STEPS - 1)).all()
    files = [tmp_path / name for name in ("pictures.png", "negatives.png", "plane.png")]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    assert set(tmp_path.iterdir()) == set(files)


def test_the_step_says_whose_thresholds_hold(runs, shapes, tmp_path):
    flags = ["--out", str(tmp_path), "--count", "3", "--data", shapes]
    commands.call("visualize", [str(runs / "u2pl"), *flags, "--step", "0"])
    first, ids = _pixels(tmp_path / "pictures.png"), spread(open_dataset(shapes), 3)
    assert (first == _expected(runs / "u2pl", ids, 0)).all()
    assert (first != _expected(runs / "u2pl", ids, STEPS - 1)).any()


def test_a_method_without_a_bank(runs, shapes, tmp_path):
    commands.call("visualize", [str(runs / "suponly"), "--out", str(tmp_path), "--count", "2"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures.png", "plane.png"]
    ids = spread(open_dataset(shapes), 2)
    assert (_pixels(tmp_path / "pictures.png") == _expected(runs / "suponly", ids, STEPS - 1)).all()


def test_the_plane_has_a_mark_for_each_point_in_the_colour_of_its_class(shapes):
    dataset = open_dataset(shapes)
    torch.manual_seed(0)
    features, label = torch.nn.functional.normalize(torch.randn(40, 5), dim=1), torch.tensor([1, 3]).repeat(20)

    def colours(stored: torch.Tensor) -> dict[tuple[int, ...], int]:
        pixels = np.asarray(drawn_plane(Points(features, label, stored), dataset)).reshape(-1, 3)
        values, counts = np.unique(pixels, axis=0, return_counts=True)
        return {tuple(map(int, value)): int(count) for value, count in zip(values, counts, strict=True)}

    pixels, keys = (colours(torch.full((40,), stored)) for stored in (False, True))
    palette = dataset.info.palette
    for c in (1, 3):
        assert pixels[palette[c]] > keys.get(palette[c], 0) > 0, "dots fill more than thin crosses"
    for c in (2, 4):
        assert palette[c] not in pixels


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--count", "0"], r"^--count 0: must be 1 or more$"),
        (["--images", "shape_0x"], r"shapes: no validation image shape_0x; did you mean shape_\d+\?$"),
        (["--step", "4"], r"^--step 4: the run has the steps 0 to 3$"),
        (["--step", "-1"], r"^--step -1: the run has the steps 0 to 3$"),
        (["--data", "nowhere"], r"nowhere"),
    ],
)
def test_bad_flags_are_one_line(runs, tmp_path, flags, line):
    with pytest.raises(UserError, match=line):
        commands.call("visualize", [str(runs / "u2pl"), "--out", str(tmp_path), *flags])
    assert list(tmp_path.iterdir()) == []


def test_a_step_of_a_method_that_parts_no_pixels_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match=r"^--step 1: suponly parts no pixels at any step; leave the flag out$"):
        commands.call("visualize", [str(runs / "suponly"), "--out", str(tmp_path), "--step", "1"])


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint there \(checkpoint.json is missing\); name a run or a folder"):
        commands.call("visualize", [str(tmp_path), "--out", str(tmp_path / "out")])
