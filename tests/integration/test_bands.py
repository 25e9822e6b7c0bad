"""Images of many bands and 16 bits, from files of other tools to masks: drawn, as no such set may be shipped."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import pipeline
from pipeline import make_config
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.inference.evaluate import evaluate
from pipeline.inference.export import export
from pipeline.training import trainer
from pipeline.training.runtime import PlainRuntime
from tests.bands import BANDS, SIDE, draw
from tests.docs import ROOT
from tests.unit.datasets.conftest import Trees


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TIFF files as another tool writes them, with masks beside them."""
    root = tmp_path_factory.mktemp("fields")
    for number in range(56):
        subset = "val" if number < 16 else "train"
        values, mask = draw(number)
        for folder in ("images", "masks"):
            (root / folder / subset).mkdir(parents=True, exist_ok=True)
        image = root / f"images/{subset}/{number:02d}.tif"
        tifffile.imwrite(image, values, photometric="minisblack", planarconfig="contig")
        (root / f"masks/{subset}/{number:02d}.png").write_bytes(Trees.encode(mask))
    return root


def prepared(tree: Path, out: Path, env: dict[str, str], bands: str) -> str:
    flags = ["--source", "folder", "--root", str(tree), "--classes", "ground,field,water", "--out", str(out)]
    command = [sys.executable, str(ROOT / "jobs/prepare.py"), *flags, "--bands", bands, "--range", "0..10000"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return str(out)


def trained(data: str, out: Path, method: str = "u2pl") -> float:
    """The score in % after 200 steps with a tiny network, on 10 labeled images of 40."""
    values = {
        **{"method": method, "split": "1_4", "out": str(out), "data.root": data, "data.crop": [SIDE, SIDE]},
        **{"optim.steps": 200, "eval.every": 200, "run.tensorboard": False},
    }
    config = make_config(values, preset="demo")
    last = trainer.train(config, PlainRuntime(str(config.out))).last
    assert last is not None
    return 100 * last.value


def test_twelve_bands_of_16_bits_from_files_to_masks(tree: Path, joined: dict[str, str], tmp_path: Path) -> None:
    data = prepared(tree, tmp_path / "data", joined, f"0..{BANDS - 1}")
    dataset = open_dataset(data)
    assert dataset.info.bands == tuple(range(BANDS))
    images = np.concatenate([draw(number)[0].reshape(-1, BANDS) for number in range(16, 56)])
    scaled = (255 * (images / 10_000)).round()
    assert dataset.info.mean == pytest.approx(scaled.mean(0), abs=1e-3)
    assert dataset.info.std == pytest.approx(scaled.std(0), abs=1e-3)

    score = trained(data, tmp_path / "run")
    assert score > 85
    visible = prepared(tree, tmp_path / "rgb", joined, "0..2")
    seen = trained(visible, tmp_path / "seen", "suponly")
    print(f"mIoU {score:.2f}, SupOnly on the first three bands {seen:.2f}")
    assert seen < 40  # what tells the classes lies in other bands

    model = pipeline.load_model(tmp_path / "run")
    file = tree / "images/val/03.tif"
    mask = model.predict(file)
    assert (mask == draw(3)[1]).mean() > 0.85
    assert (model.predict((255 * (draw(3)[0] / 10_000)).round().astype(np.uint8)) == mask).all()
    with pytest.raises(pipeline.UserError, match=r"00.png: has 1 bands, from 0 on: no band 1"):
        model.predict(tree / "masks/val/00.png")
    cpu = torch.device("cpu")
    counts = evaluate(model.network, dataset, model.config.eval, cpu)
    assert 100 * counts.scores().miou == pytest.approx(score, abs=1e-4)
    sliding = dataclasses.replace(model.config.eval, mode="sliding", window=(64, 64))
    assert evaluate(model.network, dataset, sliding, cpu).scores().miou > 0.8  # windows that are larger than the images

    assert "the classes of PyTorch" in export(str(tmp_path / "run"), str(tmp_path / "exported"), "torch_export")
    assert "bands 0 (0..10000), 1 (0..10000)" in (tmp_path / "exported/README.md").read_text()
