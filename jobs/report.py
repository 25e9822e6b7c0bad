"""Compares runs: python jobs/report.py RUNS... writes report.html, and the same tables as report.md and report.csv.

RUNS are run directories, or folders or URIs that hold some, finished or not.
"""

from pipeline import cli, storage
from pipeline.errors import UserError
from pipeline.inference.pictures import compare_networks
from pipeline.methods import OPTIONS
from pipeline.report import results
from pipeline.report.compare import Comparison, compare
from pipeline.report.html import text_table
from pipeline.report.page import Picture, as_markdown, as_page
from pipeline.report.runs import find_runs, read_run


def main(argv: list[str]) -> None:
    """Entry point."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="run directories, or folders or URIs (s3://bucket/prefix) of them")
    parser.add_argument("--out", default="report.html", help="page to write (default: report.html)")
    parser.add_argument("--images", type=int, default=5, help="validation images to show; 0: none (default: 5)")
    args = parser.parse(argv)
    if not args.out.endswith(".html"):
        raise UserError(f"--out {args.out}: must end in .html; .md and .csv are written beside it")
    if args.images < 0:
        raise UserError("--images: must be 0 or more")
    comparisons = compare([read_run(uri, OPTIONS) for uri in find_runs(args.runs)], OPTIONS)
    pictures = {at: picture(each, args.images) for at, each in enumerate(comparisons) if args.images}
    stem = args.out.removesuffix(".html")
    for ending, text in (
        ("html", as_page(comparisons, pictures)),
        ("md", as_markdown(comparisons)),
        ("csv", results.as_csv(comparisons)),
    ):
        storage.write_bytes(f"{stem}.{ending}", text.encode())
    for each in comparisons:
        print(results.headline(each), *each.notes(), *map(text_table, results.tables(each)), sep="\n\n", end="\n\n")
    print(f"report {args.out}")


def picture(comparison: Comparison, images: int) -> Picture:
    """What the networks of two runs see, or why it cannot be drawn."""
    try:
        return compare_networks({row.label: run.uri for row, run in comparison.shown()}, images)
    except (UserError, OSError) as error:
        return str(error)


if __name__ == "__main__":
    cli.run(main)
