"""Trains method x split x seed: python jobs/sweep.py --methods suponly,u2pl --splits 1_8,1_4 --seeds 2."""

from _run import run

if __name__ == "__main__":
    run("sweep")
