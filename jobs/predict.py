"""Makes masks of images with a trained network: python jobs/predict.py RUN --images s3://bucket/photos --out masks."""

from _run import run

if __name__ == "__main__":
    run("predict")
