"""Parameters and operations of the network of each preset, without computing anything: `python benchmarks/models.py`.

A multiplication with its addition counts as two operations, of convolutions, matrices and attention; the forward pass
of one training crop with all heads of the preset's method.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installation, like the jobs

from pipeline.config.backbones import find_decoder
from pipeline.config.cli import resolve
from pipeline.config.schema import Config, presets, read_preset, without_weights
from pipeline.methods import OPTIONS, build_method
from pipeline.models import SegmentationModel

CLASSES = {"camvid": 11, "cityscapes": 19, "demo": 6}
"""Of the presets' datasets; all others are VOC's 21."""


def row(name: str) -> str:
    """One line of the table."""
    config = without_weights(resolve(read_preset(name), OPTIONS))
    if config.data.background == "auto":
        config = replace(config, data=replace(config.data, background="none"))
    network, operations = counted(config, CLASSES.get(name, 21))
    encoder, whole = (sum(each.numel() for each in part.parameters()) / 1e6 for part in (network.encoder, network))
    model, (height, width) = config.model, config.data.crop
    parts = f"{model.backbone}, {find_decoder(model.decoder, model.backbone)}"
    return (
        f"| `{name}` | {parts} | {config.method} | {height}x{width} | {encoder:.1f} | {whole:.1f} | {operations:.1f} |"
    )


def counted(config: Config, classes: int) -> tuple[SegmentationModel, float]:
    """The network that a method trains, and 1e9 operations of a forward pass of one crop; both without values."""
    with torch.device("meta"):
        network = build_method(config, classes).trained()[0].eval()
        image = torch.zeros(1, 3, *config.data.crop, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(image)
    return network, counter.get_total_flops() / 1e9


def main() -> None:
    """Prints the table of the presets that are named, or of all."""
    print("| preset | network | method | crop | encoder, million | all, million | GFLOP |")
    print("|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or presets():
        print(row(name))


if __name__ == "__main__":
    main()
