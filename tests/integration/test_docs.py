"""Every command block of the pages that is not marked otherwise, as a reader would type it, on a real Ray and S3.

What is added to a command only makes it shorter: fewer steps, a smaller network, fewer seeds.
"""

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile

from pipeline import storage
from tests.bands import draw
from tests.docs import PAGES, ROOT, blocks
from tests.s3 import S3Server
from tests.unit.datasets.conftest import SIZE, Trees

SHORT = "--preset demo --data.crop 64 64 --optim.steps 2 --eval.every 2 --run.tensorboard false"
SHORT += " --optim.batch_labeled 2 --optim.batch_unlabeled 4 --scaling.workers 1"
SHORTER = {
    "u2pl train": SHORT,
    "u2pl sweep": f"{SHORT} --seeds 1 --splits 1_8 --methods u2pl",
    "u2pl search": f"{SHORT} --samples 1",
    "u2pl report": "--images 1",
}
"""What is added, by how a command begins; of a flag that is given twice the last one counts."""
DEMO = "--optim.steps 2 --eval.every 2 --scaling.workers 1"
VENV = ROOT / ".venv"
RUN = [page for page in PAGES if any(block.kind == "sh" for block in blocks(page))]


@pytest.fixture
def checkout(tmp_path: Path, shapes: str) -> Path:
    """A folder like the checkout, with photos of the reader's own beside it, in which a run leaves no trace in ours.

    The shapes dataset lies where commands that name no dataset would make it.
    """
    if not (VENV / "installed").exists():
        pytest.skip("no .venv: the pages' commands take the environment that `make install` makes")
    for name in ("Makefile", "pyproject.toml", "cluster", "requirements-dev.lock", "jobs", "pipeline", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    for part in VENV.iterdir():
        (tmp_path / ".venv" / part.name).symlink_to(part)
    (tmp_path / ".venv/installed").unlink()
    (tmp_path / ".venv/installed").touch()  # a newer one, so that make leaves the environment of this very test alone
    for number in range(20):
        subset = "val" if number < 4 else "train"
        Trees.put(tmp_path / f"photos/images/{subset}/{number:02d}.jpg", noise(number))
        if number < 16:
            Trees.put(tmp_path / f"photos/masks/{subset}/{number:02d}.png", Trees.mask(number))
    Trees.put(tmp_path / "photo.jpg", Trees.image())
    exports(tmp_path)
    shutil.copytree(shapes, tmp_path / "data/shapes")
    return tmp_path


def exports(folder: Path) -> None:
    """What other tools give: labelme's tree, CVAT's export, scans of 16 bits, twelve bands, photos of a phone."""
    colors = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)
    for number in range(10):
        ids = Trees.ids(number) % 3
        for tool, masks, mask in (
            ("labelme", "SegmentationClassPNG", Trees.encode(ids, mode="P")),
            ("cvat", "SegmentationClass", Trees.encode(colors[ids])),
        ):
            Trees.put(folder / tool / f"JPEGImages/{number:02d}.jpg", noise(100 + number))
            Trees.put(folder / tool / masks / f"{number:02d}.png", mask)
        subset = "val" if number < 3 else "train"
        deep = np.random.default_rng(number).integers(0, 1 << 16, SIZE, np.uint16)
        Trees.put(folder / f"scans/images/{subset}/{number}.tif", Trees.encode(deep, "TIFF"))
        Trees.put(folder / f"scans/masks/{subset}/{number}.png", Trees.encode((ids > 0).astype(np.uint8) * 255))
        Trees.put(folder / f"phone/images/{subset}/{number}.jpg", Trees.turned(6 if number % 2 else 1))
        upright = np.ascontiguousarray(ids.T) if number % 2 else ids
        Trees.put(folder / f"phone/masks/{subset}/{number}.png", Trees.encode((upright > 0).astype(np.uint8)))
        tifffile.imwrite(deepest := io.BytesIO(), draw(number)[0], photometric="minisblack", planarconfig="contig")
        Trees.put(folder / f"fields/images/{subset}/{number}.tif", deepest.getvalue())
        Trees.put(folder / f"fields/masks/{subset}/{number}.png", Trees.encode(draw(number)[1]))
    Trees.put(folder / "phone/images/train/live.heic", b"x")
    Trees.put(folder / "labelme/labels.txt", "__ignore__\n_background_\ndisk\nsquare\n")
    Trees.put(
        folder / "cvat/labelmap.txt",
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ndisk:128,0,0::\nsquare:0,128,0::\n",
    )
    for name, numbers in (("Train", range(8)), ("Validation", range(8, 10))):
        Trees.put(folder / f"cvat/ImageSets/Segmentation/{name}.txt", "".join(f"{number:02d}\n" for number in numbers))


def noise(seed: int) -> bytes:
    """A JPEG of its own for every seed."""
    return Trees.encode(np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8), "JPEG")


def fill_bucket(root: str, folder: Path) -> None:
    """What the pages take for granted in s3://bucket: a VOC tree, photos, tar shards and a Parquet file."""
    tree = Trees.voc(folder / "tree", train=16, val=2, extra=4)
    for number, image in enumerate(sorted(tree.rglob("*.jpg"))):
        image.write_bytes(noise(number))  # a picture of its own, as `--check` looks for copies
    for file in (path for path in tree.rglob("*") if path.is_file()):
        storage.write_bytes(f"{root}/VOC2012/{file.relative_to(tree)}", file.read_bytes())
    photos = [noise(number) for number in range(50, 58)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, data in enumerate(photos):
            storage.write_bytes(f"{root}/photos/{number}.jpg", data)
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    storage.write_bytes(f"{root}/wds/0.tar", buffer.getvalue())
    table = io.BytesIO()
    pq.write_table(pa.table({"image": photos}), table)
    storage.write_bytes(f"{root}/laion/0.parquet", table.getvalue())


def shortened(command: str) -> str:
    added = next((more for start, more in SHORTER.items() if command.startswith(start)), "")
    return f"{command} {added}".strip()


@pytest.fixture
def environment(joined: dict[str, str]) -> dict[str, str]:
    return {**joined, "DEMO_FLAGS": DEMO}


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page(
    page: Path, environment: dict[str, str], s3: S3Server, checkout: Path, tmp_path: Path
) -> None:
    root = f"{s3.bucket_uri}/{tmp_path.name}"
    lines = [shortened(line) for block in blocks(page) if block.kind == "sh" for line in block.commands]
    script = "\n".join(["set -euo pipefail", *lines]).replace("s3://bucket", root)
    if root in script:
        fill_bucket(root, tmp_path)
    done = subprocess.run(
        ["bash", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stdout + done.stderr


def test_the_lines_of_python(environment: dict[str, str], checkout: Path) -> None:
    (block,) = [each for each in blocks(ROOT / "docs/README.md") if each.kind == "python"]
    assert len([line for line in block.text.splitlines() if line]) == 5
    shorter = block.text.replace('"out": "runs/first"', '"out": "runs/first", "optim.steps": 2, "eval.every": 2')
    assert shorter != block.text
    done = subprocess.run(
        [sys.executable, "-c", shorter], cwd=checkout, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "('background', 'disk', 'square', 'triangle', 'cross', 'ring') [[" in done.stdout
