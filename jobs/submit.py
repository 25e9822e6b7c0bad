"""Sends a command to a cluster and follows it to its end: python jobs/submit.py -- jobs/train.py --split 1_2."""

from _run import run

if __name__ == "__main__":
    run("submit")
