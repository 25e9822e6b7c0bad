"""Draws what a trained method sees: python jobs/visualize.py RUN --out DIR."""

from _run import run

if __name__ == "__main__":
    run("visualize")
