"""Writes a run's network for use elsewhere: python jobs/export.py RUN --out DIR."""

from _run import run

if __name__ == "__main__":
    run("export")
