"""Compares runs on a page, as Markdown and as CSV: python jobs/report.py RUNS... --out report.html."""

from _run import run

if __name__ == "__main__":
    run("report")
