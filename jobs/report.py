"""Compares finished runs: their mIoU, and a picture of what they see: python jobs/report.py RUN... --out panels.png."""

import json

import torch

from pipeline import cli, storage
from pipeline.checkpoint import Progress
from pipeline.datasets.format import open_dataset
from pipeline.errors import UserError
from pipeline.inference.pictures import draw
from pipeline.inference.restore import restore


def main(argv: list[str]) -> None:
    """Entry point."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="run directories on one dataset; entropy is drawn of the last")
    parser.add_argument("--out", default="panels.png", help="picture to write (default: panels.png)")
    parser.add_argument("--images", type=int, default=5, help="validation images to show (default: 5)")
    args = parser.parse(argv)
    if args.images < 1:
        raise UserError("--images: at least one")
    restored = [restore(run, torch.device("cpu")) for run in args.runs]
    dataset = open_dataset(str(restored[-1][0].data.root))
    titles = [config.method for config, _ in restored]
    if len({*titles}) < len(titles):
        titles = [f"{config.method} {config.split} s{config.seed}" for config, _ in restored]
    networks = {title: method.predictor() for title, (_, method) in zip(titles, restored, strict=True)}
    draw(networks, dataset, restored[-1][0].eval, args.images, args.out)
    for run, (config, _) in zip(args.runs, restored, strict=True):
        progress = Progress.from_dict(json.loads(storage.read_bytes(storage.join(run, "summary.json"))))
        if progress.last and progress.best:
            last, best = 100 * progress.last.value, 100 * progress.best.value
            print(f"{config.method:>10}  split {config.split}  val mIoU last {last:.2f}  best {best:.2f}")
    print(f"picture {args.out}")


if __name__ == "__main__":
    cli.run(main)
