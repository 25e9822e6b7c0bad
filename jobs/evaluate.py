"""Scores a checkpoint on a validation set: python jobs/evaluate.py RUN_OR_CHECKPOINT --data URI."""

import torch

from pipeline import cli
from pipeline.inference.restore import score
from pipeline.report.tables import class_table


def main(argv: list[str]) -> None:
    """Entry point."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("checkpoint", help="checkpoint folder, or run directory (its newest checkpoint is scored)")
    parser.add_argument("--data", help="prepared dataset (default: the one of the run)")
    args = parser.parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset, scores = score(args.checkpoint, args.data, device)
    for name, each in scores.items():
        print(f"{name}\n{class_table(dataset.info.classes, each.iou)}\nval mIoU {name} {100 * each.miou:.2f}")


if __name__ == "__main__":
    cli.run(main)
