"""Trains a teacher, labels the unlabeled images with it, trains a student: python jobs/self_training.py --split 1_8."""

from _run import run

if __name__ == "__main__":
    run("self_training")
