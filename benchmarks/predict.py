"""What the worker code of `u2pl predict` costs beside the same network in a plain loop.

    python benchmarks/predict.py [--rounds 9] [--backbone tiny] [--size 375 500]

One process, one thread of torch, no Ray. A unit of photos is made by `MaskWriter` and by a loop that reads a file,
decodes it, runs the network and writes a palette PNG; they take turns on the same files, each begins every other
round. Seconds are those of the CPU, of all threads. The network has random weights, and the photos are generated.
"""

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installation, like the jobs

import numpy as np
import torch
from PIL import Image

from pipeline import checkpoint
from pipeline.checkpoint import Progress
from pipeline.datasets.specs import voc_palette
from pipeline.inference.load import Model, load_model
from pipeline.inference.mask_writer import MaskWriter, Recipe
from pipeline.inference.units import Unit, list_images
from pipeline.methods import build_method, make_config

CLASSES = 21


def write_photos(folder: Path, count: int, height: int, width: int) -> None:
    """Smooth JPEGs with some noise."""
    folder.mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        noisy = (pixels + rng.integers(-12, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:03d}.jpg", quality=90)


def write_run(folder: Path, backbone: str) -> str:
    """A checkpoint of a network that was not trained."""
    config = make_config({"method": "suponly", "model.backbone": backbone, "model.weights": "none"})
    data = {"index": "", "split": "", "classes": [f"class {number}" for number in range(CLASSES)]}
    about = {"palette": voc_palette(CLASSES), "evaluation": "whole"}
    place = folder / checkpoint.name(1)
    place.mkdir(parents=True)
    method = build_method(config, CLASSES)
    checkpoint.save(place, config, data, about, Progress(1), method=method.state_dict(), optimizer={})
    return str(place)


@torch.no_grad()
def plain(model: Model, photos: Path, unit: Unit, out: Path) -> None:
    """The least that makes the same files."""
    palette = [channel for color in model.palette for channel in color]
    for file, name in zip(unit.ids, unit.names, strict=True):
        pixels = np.array(Image.open(io.BytesIO((photos / file).read_bytes())).convert("RGB"))
        logits = model.network(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        size = (pixels.shape[0], pixels.shape[1])
        logits = torch.nn.functional.interpolate(logits.float(), size, mode="bilinear", align_corners=True)
        mask = Image.fromarray(logits.argmax(1)[0].byte().numpy())
        mask.putpalette(palette)
        mask.save(out / f"{name}.png")


def main() -> None:
    """Runs the rounds and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="predict-") as folder:
        root = Path(folder)
        write_photos(root / "photos", 32, *arguments.size)
        place = write_run(root / "run", arguments.backbone)
        model, (unit,) = load_model(place), list_images(str(root / "photos")).units
        writer = MaskWriter(Recipe(str(root / "out"), place, ()), "cpu")
        (root / "plain").mkdir()
        took: dict[str, list[float]] = {"plain loop": [], "u2pl predict": []}
        for index in range(-1, arguments.rounds):  # the first one warms up and does not count
            for name in sorted(took, reverse=index % 2 == 0):
                began = time.process_time()
                if name == "plain loop":
                    plain(model, root / "photos", unit, root / "plain")
                else:
                    writer.write(unit._replace(number=index + 1))
                if index >= 0:
                    took[name].append(time.process_time() - began)
        same = [
            (root / f"plain/{name}.png").read_bytes() == (root / f"out/masks/{name}.png").read_bytes()
            for name in unit.names
        ]
    print(f"{len(unit.names)} photos, {arguments.backbone}, {arguments.rounds} rounds; {sum(same)} equal masks")
    for name, seconds in took.items():
        print(f"{name:<13} {len(unit.names) / statistics.median(seconds):6.2f} images per CPU second")
    ratios = [a / b for a, b in zip(took["plain loop"], took["u2pl predict"], strict=True)]
    print(f"predict / plain: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} by round)")


if __name__ == "__main__":
    main()
