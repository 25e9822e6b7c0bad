"""What is done with a trained network."""

import inspect
from functools import partial

from pipeline.config import cli
from pipeline.errors import UserError

EXPORT_FORMATS = ("torch_export", "onnx", "safetensors")
SHOWN_IMAGES = 6
"""Validation images that `visualize` draws."""


def evaluate(argv: list[str]) -> None:
    """Scores a checkpoint on a prepared dataset: u2pl evaluate RUN_OR_CHECKPOINT.

    Without flags it scores as the training does.
    """
    parser = cli.Parser(description=inspect.getdoc(evaluate))
    add = parser.add_argument
    add("checkpoint", help="checkpoint folder, or run directory (its newest checkpoint is scored)")
    add("--data", metavar="URI", help="prepared dataset (default: the one of the run)")
    add("--subset", choices=("val", "train"), default="val", help="train: its images with a mask (default: val)")
    help_text = "voc_crop513: as the U2PL release scores VOC (default: as the run scores itself)"
    add("--mode", choices=("whole", "sliding", "voc_crop513"), help=help_text)
    add("--window", nargs=2, type=int, metavar=("H", "W"), help="that slides (default: eval.window of the run)")
    help_text = "average over these sizes, as factors of the run's eval.scale (default: 1)"
    add("--scales", nargs="+", type=float, default=[1.0], metavar="X", help=help_text)
    add("--flip", action="store_true", help="average over mirrored images, too")
    add("--batch", type=int, metavar="N", help="images at a time (default: 8, fewer of large ones)")
    add("--json", metavar="FILE", help="write all numbers there")
    add("--page", metavar="FILE", help="write a page: classes, confusion, reliability, the worst images")
    help_text = "write the predictions there, as the servers of Cityscapes and VOC take them"
    add("--export_submission", metavar="DIR", help=help_text)
    args = parser.parse(argv)
    from pipeline import checkpoint, storage

    checkpoint.find(storage.absolute(args.checkpoint))  # if there is none, that is said before torch is imported
    from pipeline.inference.score_tasks import plan, score
    from pipeline.patience import retried
    from pipeline.report.scores_page import as_json, as_page, as_text

    job = plan(
        args.checkpoint,
        args.data,
        args.subset,
        window=tuple(args.window) if args.window else None,
        pictures=args.page is not None,
        submission=args.export_submission,
        **{key: vars(args)[key] for key in ("mode", "scales", "flip", "batch")},
    )
    tallies = score(job)
    try:
        for place, form in ((args.json, as_json), (args.page, as_page)):
            if place:
                retried(partial(storage.write_bytes, place, form(job, tallies).encode()))
                print(f"written {place}")
        if args.export_submission:
            print(f"{job.images} predictions of the {next(iter(tallies))} in {args.export_submission}")
    finally:
        print(as_text(job, tallies))  # also where a file cannot be written: scoring may have taken hours


def predict(argv: list[str]) -> None:
    """Makes masks of images with a trained network: u2pl predict RUN --images s3://bucket/photos --out masks.

    With --rank it also says which images to label next. The same command goes on where it was cut off.
    """
    parser = cli.Parser(description=inspect.getdoc(predict))
    add = parser.add_argument
    add("run", help="run directory (its newest checkpoint is taken), or checkpoint folder")
    add("--images", required=True, metavar="URI", help="folder of photos, pool, or prepared dataset")
    add("--out", required=True, metavar="URI", help="where to write: empty, or what the same command has begun")
    add(
        "--subset",
        choices=("train", "val", "unlabeled"),
        help="of a dataset; unlabeled: train images without a mask (default: all)",
    )
    add("--overlays", action="store_true", help="write each photo under its mask, too (JPEG)")
    add("--entropy", action="store_true", help="write the entropy of each pixel, too (grey PNG, 255 is log C)")
    add("--probabilities", action="store_true", help="write the probabilities, too (float16 [C,H,W] in .npz)")
    add(
        "--rank",
        choices=("entropy", "margin", "unreliable"),
        help="write ranking.csv and ranking.html, too: which images to label next",
    )
    add("--diverse", type=int, default=0, metavar="N", help="let the first N of --rank differ in what they show, too")
    add("--as_dataset", choices=("voc",), help="write a VOC tree, which CVAT and u2pl prepare read")
    add("--overwrite", action="store_true", help="delete what predict has written to --out before")
    args = parser.parse(argv)
    from pipeline.datasets.files import counts_of
    from pipeline.inference import predictions
    from pipeline.patience import Patience
    from pipeline.report.ranking_page import write_ranking
    from pipeline.training.lease import held

    options = [name for name in ("overlays", "entropy", "probabilities", "rank") if vars(args)[name]]
    options += [args.as_dataset] if args.as_dataset else []
    if args.diverse:
        if args.diverse < 0 or not args.rank:
            raise UserError("--diverse: how many images to choose, more than 0, together with --rank")
        options.append("diverse")
    job = predictions.plan(args.run, args.images, args.out, tuple(options), args.subset)
    if job.listing.passed:
        print(f"passed over pictures of kinds that are not read: {counts_of(job.listing.passed)}")
    predictions.check_place(job, overwrite=args.overwrite)  # before the lease, which is written there
    with held(job.out, Patience()):
        done = predictions.carry_out(job, overwrite=args.overwrite)
        if args.rank:
            write_ranking(job, args.rank, args.diverse)
            print(f"ranking {args.out}/ranking.csv, {args.out}/ranking.html")
    if done.turned:
        print(f"photos that note a rotation, which their masks do not follow: {done.turned}")
    images = "image" if done.left_out == 1 else "images"
    left_out = f", {done.left_out} {images} left out ({args.out}/left_out.txt names them)" if done.left_out else ""
    print(f"{done.masks} masks in {args.out}{left_out}")


def demo(argv: list[str]) -> None:
    """Shows what a trained network sees in your photos, on a page of this machine: u2pl demo RUN."""
    parser = cli.Parser(description=inspect.getdoc(demo))
    help_text = "run directory (its newest checkpoint is taken), checkpoint folder, or export as safetensors"
    parser.add_argument("run", help=help_text)
    parser.add_argument("--port", type=int, default=8000, help="where to listen; 0: a free port (default: 8000)")
    help_text = "who may ask: 0.0.0.0 is every machine (default: 127.0.0.1, this one alone)"
    parser.add_argument("--host", default="127.0.0.1", help=help_text)
    args = parser.parse(argv)
    from pipeline.demo import application, serve
    from pipeline.inference.load import any_device, load_model

    model = load_model(args.run, any_device())
    serve(application(model, f"What {args.run} sees"), args.host, args.port)


def export(argv: list[str]) -> None:
    """Writes a run's network for use elsewhere: u2pl export RUN --out DIR --format torch_export."""
    parser = cli.Parser(description=inspect.getdoc(export))
    parser.add_argument("run", help="run directory (its newest checkpoint is taken) or checkpoint folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder or URI to write into")
    help_text = "a program for torch alone or for ONNX Runtime, or the weights (default: torch_export)"
    parser.add_argument("--format", choices=EXPORT_FORMATS, default="torch_export", help=help_text)
    parser.add_argument("--classes", action="store_true", help="the program gives class ids instead of logits")
    parser.add_argument("--half", action="store_true", help="weights in bfloat16: half the size")
    args = parser.parse(argv)
    from pipeline.inference.export import export as write

    print(write(args.run, args.out, args.format, classes=args.classes, half=args.half))


def visualize(argv: list[str]) -> None:
    """Draws what a trained method sees: u2pl visualize RUN --out DIR.

    In pictures.png: image, truth, prediction, entropy, the pixels that the method relies on, and what it takes the
    others for. In negatives.png: of which classes each pixel is a negative. In plane.png: features of pixels, and the
    memory bank.
    """
    parser = cli.Parser(description=inspect.getdoc(visualize))
    add = parser.add_argument
    add("run", help="run directory (its newest checkpoint is taken), or checkpoint folder")
    add("--out", required=True, metavar="DIR", help="folder or URI to write into")
    add("--data", help="prepared dataset (default: the one of the run)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--images", nargs="+", default=[], metavar="NAME", help="ids of validation images")
    help_text = f"so many validation images, evenly spread (default: {SHOWN_IMAGES})"
    which.add_argument("--count", type=int, default=SHOWN_IMAGES, help=help_text)
    help_text = "part the pixels as at this step of the run, from 0 (default: the checkpoint's last)"
    add("--step", type=int, help=help_text)
    args = parser.parse(argv)
    from pipeline.inference.load import any_device
    from pipeline.report.visualize import visualize as write

    chosen = {name: vars(args)[name] for name in ("data", "images", "count", "step")}
    print(*write(args.run, args.out, any_device(), **chosen), sep="\n")
