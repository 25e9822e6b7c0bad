"""Compares runs: python jobs/report.py RUNS... writes report.html, and the same tables as report.md and report.csv.

RUNS are run directories, or folders or URIs that hold some, finished or not.
"""

from pipeline import cli
from pipeline.inference.comparison import write_report
from pipeline.report import results
from pipeline.report.html import text_table


def main(argv: list[str]) -> None:
    """Entry point."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="run directories, or folders or URIs (s3://bucket/prefix) of them")
    parser.add_argument("--out", default="report.html", help="page to write (default: report.html)")
    parser.add_argument("--images", type=int, default=5, help="validation images to show; 0: none (default: 5)")
    args = parser.parse(argv)
    for each in write_report(args.runs, args.out, args.images):
        print(results.headline(each), *each.notes(), *map(text_table, results.tables(each)), sep="\n\n", end="\n\n")
    print(f"report {args.out}")


if __name__ == "__main__":
    cli.run(main)
