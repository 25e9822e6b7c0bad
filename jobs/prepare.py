"""Makes a prepared dataset or a pool: jobs/prepare.py --source voc --root VOC2012 --out s3://bucket/voc.

With --check s3://bucket/voc it looks through a finished dataset instead, and reports what it finds.
"""

from pipeline import cli, storage
from pipeline.datasets import shards
from pipeline.datasets.check import check
from pipeline.datasets.flags import POOL_FLAGS, parse, read_raw
from pipeline.datasets.format import open_dataset
from pipeline.datasets.pool_sources import POOL_SOURCES
from pipeline.datasets.pool_writer import make_pool
from pipeline.datasets.prepare import prepare
from pipeline.datasets.shapes import prepare_shapes
from pipeline.errors import RunError
from pipeline.report.check import as_page, as_text


def main(argv: list[str]) -> None:
    """Prepares or checks what the flags say."""
    args = parse(argv, __doc__)
    if args.check:
        report(args.check, args.page)
        return
    if args.source in POOL_SOURCES:
        flags = {key: vars(args)[key] for key in POOL_FLAGS}
        pool = make_pool(args.source, args.root, args.out, name=args.name or args.source, **flags)
        print(f"{args.out}: {pool.told}")
        return
    if args.source == "shapes":
        shards.claim(storage.absolute(args.out), args.overwrite)
        info = prepare_shapes(args.out, args.seed)
    else:
        samples, facts = read_raw(args)
        info = prepare(
            samples,
            args.out,
            name=args.name or args.source,
            facts=facts,
            seed=args.seed,
            release=(args.splits, args.protocol) if args.splits else None,
            **{key: vars(args)[key] for key in ("overwrite", "skip_bad", "workers")},
        )
    print(f"{args.out}: {info.counts['train']} train, {info.counts['val']} val, {info.skipped} skipped")


def report(uri: str, page: str) -> None:
    """Prints what is in a dataset, writes it as a page with pictures, and fails if something is broken."""
    found = check(open_dataset(uri))
    print(as_text(found))
    storage.write_bytes(page, as_page(found).encode())
    print(f"page {page}")
    if found.problems:
        raise RunError(f"{uri}: {len(found.problems)} problems, the first: {found.problems[0]}")


if __name__ == "__main__":
    cli.run(main)
