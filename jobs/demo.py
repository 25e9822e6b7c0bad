"""Shows what a trained network sees in your photos, on a page of this machine: python jobs/demo.py RUN."""

from _run import run

if __name__ == "__main__":
    run("demo")
