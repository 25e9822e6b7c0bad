"""Makes a prepared dataset or a pool: jobs/prepare.py --source voc --root VOC2012 --out s3://bucket/voc."""

from pipeline import cli, storage
from pipeline.datasets import shards
from pipeline.datasets.facts import find_facts
from pipeline.datasets.pool_sources import POOL_SOURCES
from pipeline.datasets.pool_writer import make_pool
from pipeline.datasets.prepare import prepare
from pipeline.datasets.readers import read_tree
from pipeline.datasets.shapes import prepare_shapes
from pipeline.errors import UserError

SOURCES = ["shapes", "voc", "cityscapes", "folder", *POOL_SOURCES]


def _parser() -> cli.Parser:
    parser = cli.Parser(description="Make a prepared dataset: sharded, indexed, checked, with split lists.")
    add = parser.add_argument
    add("--source", required=True, choices=SOURCES, help="layout of the raw tree; images, tar, parquet: pools")
    add("--root", help="raw tree: path or URI")
    add("--out", required=True, help="dataset to write: path or URI")
    add("--classes", help="known dataset, names a,b,c, or a file with one a line (default: as the source)")
    add("--name", help="what to call the dataset (default: the source)")
    add("--splits", metavar="DIR", help="published split lists to take over")
    add("--protocol", help="which of them: classic, blender, cityscapes, or a name of your own")
    add("--masks", help="folder of the masks in a voc tree, such as SegmentationClassAug")
    add("--train_list", help="list of a voc tree with the training images (default: trainaug or train)")
    add("--val_list", help="list of a voc tree with the images to score (default: val)")
    add("--seed", type=int, default=0, help="of row order, generated splits and shapes (default: 0)")
    add("--overwrite", action="store_true", help="replace what is finished")
    add("--skip_bad", action="store_true", help="leave bad samples out instead of stopping")
    add("--copy", action="store_true", help="keep the images in a pool; else it holds links to them")
    add("--append", action="store_true", help="add images to a pool that it does not have yet")
    add("--workers", type=int, help="shards made at a time (default: one per CPU)")
    return parser


def main(argv: list[str]) -> None:
    """Prepares what the flags say."""
    args = _parser().parse(argv)
    if args.source in POOL_SOURCES:
        if not args.root:
            raise UserError(f"--source {args.source} needs --root")
        flags = {key: vars(args)[key] for key in ("copy", "append", "overwrite", "skip_bad", "workers")}
        pool = make_pool(args.source, args.root, args.out, name=args.name or args.source, **flags)
        print(f"{args.out}: {pool.told}")
        return
    if args.copy or args.append:
        raise UserError(f"--copy and --append are for pools: --source {', '.join(POOL_SOURCES)}")
    if bool(args.splits) != bool(args.protocol):
        raise UserError("--splits and --protocol go together: a folder of lists, and which of them")
    if args.source == "shapes":
        shards.claim(storage.absolute(args.out), args.overwrite)
        info = prepare_shapes(args.out, args.seed)
    else:
        options = {key: vars(args)[key] for key in ("masks", "train_list", "val_list") if vars(args)[key]}
        info = prepare(
            read_tree(args.source, args.root, options),
            args.out,
            name=args.name or args.source,
            facts=find_facts(args.classes or args.source),
            seed=args.seed,
            release=(args.splits, args.protocol) if args.splits else None,
            **{key: vars(args)[key] for key in ("overwrite", "skip_bad", "workers")},
        )
    print(f"{args.out}: {info.counts['train']} train, {info.counts['val']} val, {info.skipped} skipped")


if __name__ == "__main__":
    cli.run(main)
