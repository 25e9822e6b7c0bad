"""Trains one method on one split: python jobs/train.py --split 1_2."""

from _run import run

if __name__ == "__main__":
    run("train")
