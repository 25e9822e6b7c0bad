"""Makes a prepared dataset or a pool: python jobs/prepare.py --source voc --root VOC2012 --out s3://bucket/voc."""

from _run import run

if __name__ == "__main__":
    run("prepare")
