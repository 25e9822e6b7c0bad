"""Searches good options of one method: python jobs/search.py --space optim.lr=0.001..0.1 --samples 12 --asha."""

from _run import run

if __name__ == "__main__":
    run("search")
