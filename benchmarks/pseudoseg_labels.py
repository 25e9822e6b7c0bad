"""How good the labels are that PseudoSeg teaches: `python benchmarks/pseudoseg_labels.py RUN ...`, a line for each run.

Decoder, class activation maps and what is fused of both label the unlabeled images of the run's split, whose masks no
method sees; val mIoU is of other images. The classifier's classes are counted over these images, too.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installation, like the jobs

from pipeline.datasets.images import decode_image, decode_mask
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.inference.evaluate import ConfusionMatrix
from pipeline.inference.load import restore
from pipeline.ingest.groups import LABELED
from pipeline.ingest.order import select_groups
from pipeline.ingest.read import read_rows
from pipeline.methods.pseudoseg import PseudoSeg, calibrated_fusion
from pipeline.models import upsample
from pipeline.ops.world import World
from pipeline.patience import Patience


@torch.no_grad()
def measured(run: str) -> str:
    """One line of the table."""
    config, method = restore(run, torch.device("cpu"))
    assert isinstance(method, PseudoSeg), f"{run}: trained {config.method}"
    dataset = open_dataset(str(config.data.root))
    split, classes = load_split(dataset, config.split, config.data.protocol), len(dataset.info.classes)
    labels = {name: ConfusionMatrix(classes) for name in ("decoder", "maps", "fused")}
    named = shown = right = 0
    objects = torch.tensor([each for each in range(classes) if each != method.background]).view(-1, 1, 1)
    for group in select_groups(dataset, split.unlabeled, LABELED):
        table = read_rows(group, None, Patience())
        for image, mask in zip(table["image"].to_pylist(), table["mask"].to_pylist(), strict=True):
            pixels = torch.from_numpy(decode_image(image).copy()).permute(2, 0, 1)[None]
            truth = torch.from_numpy(decode_mask(mask).copy())[None]
            maps = method.student.encode(pixels)
            decoder = method.student.decode(maps).logits
            present = method.cam.logits(maps.high).sigmoid() >= method.options.present
            refined = upsample(
                method.cam(maps, present, torch.ones_like(truth, dtype=torch.bool)),
                (decoder.shape[2], decoder.shape[3]),
            )
            fused = calibrated_fusion(decoder, refined, method.options.temperature, World())
            for matrix, logits in zip(labels.values(), (decoder, refined, fused), strict=True):
                matrix.update(upsample(logits, (truth.shape[1], truth.shape[2])).argmax(1), truth)
            there = (truth == objects).flatten(1).any(1)
            named, shown, right = (
                named + int(present.sum()),
                shown + int(there.sum()),
                right + int((there & present).sum()),
            )
    scores = " | ".join(f"{100 * matrix.scores().miou:.1f}" for matrix in labels.values())
    return f"| {Path(run).name} | {scores} | {right / shown:.0%} | {(named - right) / named:.0%} |"


def main() -> None:
    """Prints the table of the runs that are named."""
    print("| run | decoder | maps | fused | classes found | of those named not there |")
    print("|---|---|---|---|---|---|")
    for run in sys.argv[1:]:
        print(measured(run))


if __name__ == "__main__":
    main()
