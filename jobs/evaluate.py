"""Scores a checkpoint on a validation set: python jobs/evaluate.py RUN_OR_CHECKPOINT."""

from _run import run

if __name__ == "__main__":
    run("evaluate")
