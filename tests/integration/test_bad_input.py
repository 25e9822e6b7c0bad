"""A user's mistakes: exit code 2 and one line that names the thing; never a traceback."""

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.__main__ import command
from pipeline.config import cli
from pipeline.config.schema import to_yaml
from pipeline.methods import OPTIONS
from tests.s3 import READER_KEY, READER_SECRET, S3Server


class Jobs:
    """Runs a job in this process, as its command line would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.printed = ""
        """On stdout, by the job that failed last."""

    def fails(self, job: str, *argv: str) -> str:
        """The one line on stderr of a job that must exit with 2."""
        self._monkeypatch.setattr(sys, "argv", [f"{job}.py", *argv])
        with pytest.raises(SystemExit) as ended:
            command(job)
        self.printed, line = self._capsys.readouterr()
        assert ended.value.code == 2
        assert line.count("\n") == 1, line
        assert "Traceback" not in line
        return line


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Jobs]:
    monkeypatch.chdir(tmp_path)
    yield Jobs(monkeypatch, capsys)
    if ray := sys.modules.get("ray"):  # a job that began its work, against what its test expects, has left one behind
        ray.shutdown()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--split", "1_3"], ["1_3", "1_16, 1_2, 1_4, 1_8, full"]),
        (["--preset", "voc_clasic"], ["voc_clasic", "did you mean voc_classic"]),
        (["--method", "u2p"], ["u2p", "did you mean u2pl"]),
        (["--optim.lrr", "0.1"], ["--optim.lrr", "did you mean --optim.lr"]),
        (["--optim.lr", "fast"], ["optim.lr", "fast"]),
        (["--data.protocol", "classic"], ["classic", "random"]),
        (["--model.backbone", "resnet51"], ["resnet51"]),
        (["--model.weights", "nowhere.pth"], ["nowhere.pth"]),
        (["--optim.batch_labeled", "500"], ["25 labeled images", "batch_labeled"]),
        (["--optim.batch_unlabeled", "500"], ["375 unlabeled images", "batch_unlabeled"]),
        (["--loss.class_weights", "1", "2"], ["loss.class_weights", "2 numbers for 6 classes"]),
        (["--data.background", "6"], ["data.background 6", "classes 0 to 5"]),
        (["--out", "s3://"], ["bucket"]),
        (["--data.unlabeled_pools", "nowhere"], ["nowhere: no pool there", "u2pl prepare"]),
        (["--data.unlabeled_pools", "a", "--data.pool_weights", "1"], ["data.pool_weights", "2 numbers"]),
    ],
)
def test_settings(jobs: Jobs, shapes: str, argv: list[str], named: list[str]) -> None:
    base = [] if "--preset" in argv else ["--preset", "demo"]
    split = [] if "--split" in argv else ["--split", "1_16"]
    line = jobs.fails("train", *base, *split, "--data", shapes, *argv)
    assert [word for word in named if word not in line] == [], line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--source", "voc"], "--out"),
        (["--source", "voc", "--out", "x"], "needs --root"),
        (["--source", "voc", "--out", "x", "--root", "y", "--splits", "z"], "go together"),
        (["--source", "shapes", "--out", "x", "--over"], "--over"),
        (["--source", "folder", "--root", "y", "--out", "x", "--classes", "a,b", "--sbd", "z"], "--sbd belongs to"),
        (["--source", "voc", "--root", "y", "--out", "x", "--values", "1=99"], "ids are 0 to 20"),
        (["--check", "x"], "no dataset there"),
        (["--check", "x", "--source", "voc"], "not allowed with"),
        ([], "one of the arguments --source --check is required"),
    ],
)
def test_flags_of_prepare(jobs: Jobs, flags: list[str], words: str) -> None:
    line = jobs.fails("prepare", *flags)
    assert words in line
    assert jobs.printed == ""


def test_yaml_files(jobs: Jobs, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lrr: 0.1}\n")
    assert "did you mean lr?" in jobs.fails("train", "--config", str(file))
    file.write_text("optim: [1\n")
    assert "not valid YAML" in jobs.fails("train", "--config", str(file))
    assert "absent.yaml" in jobs.fails("train", "--config", "absent.yaml")
    with file.open("wb") as huge:
        huge.truncate(3 << 30)  # an archive that was taken for it; reading that would end this process
    assert "run.yaml: larger than 1 MiB; this is no config file" in jobs.fails("train", "--config", str(file))
    assert "1e+39: with optim.head_lr_mult it is beyond" in jobs.fails("train", "--optim.lr", "1e39")


def test_a_missing_or_half_written_dataset(jobs: Jobs, shapes: str, tmp_path: Path) -> None:
    assert "make one with `u2pl prepare`" in jobs.fails("train", "--data", str(tmp_path / "nothing"))
    half = tmp_path / "half"
    shutil.copytree(shapes, half)
    (half / "dataset.json").rename(half / "prepare.json")
    assert "prepare did not finish" in jobs.fails("train", "--data", str(half))


def test_labeled_list_with_an_unknown_id(jobs: Jobs, shapes: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shapes, copy)
    listed = copy / "splits" / "random" / "1_16" / "labeled.txt"
    listed.write_text(listed.read_text() + "no_such_image\n")
    line = jobs.fails("train", "--preset", "demo", "--split", "1_16", "--data", str(copy))
    assert "no_such_image" in line
    assert "labeled.txt" in line


def test_another_run_in_the_directory(jobs: Jobs, shapes: str, tmp_path: Path) -> None:
    flags = ["--preset", "demo", "--split", "1_16", "--data", shapes, "--out", str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    config, _ = cli.parse_config(flags, "", OPTIONS)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "run" / "summary.json").write_text("{}")  # it is finished: one without a checkpoint would give way
    line = jobs.fails("train", *flags, "--optim.lr", "0.5")
    assert "optim.lr" in line
    assert "--fresh" in line


def test_names_that_are_too_long(jobs: Jobs, shapes: str, tmp_path: Path, bucket: str) -> None:
    flags = ["--preset", "demo", "--split", "1_16", "--data", shapes]
    for place, kind in ((str(tmp_path), "disk"), (bucket, "storage")):
        line = jobs.fails("train", *flags, "--out", f"{place}/{'ü' * 150}")
        assert line.endswith(f"the name is too long for the {kind}: choose a shorter one\n")
    deep = "/".join([bucket, *["n" * 200] * 5])
    line = jobs.fails("train", *flags, "--out", deep)
    assert line.endswith("bytes below the bucket; choose a place of at most 850\n")
    assert storage.list_files(deep) == []


def test_pools(jobs: Jobs, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "--source tar needs --root" in jobs.fails("prepare", "--source", "tar", "--out", "pool")
    images = ["--source", "images", "--root", str(empty)]
    assert "files below it; check --root and --source" in jobs.fails("prepare", *images, "--out", "pool")
    assert "lies inside --root" in jobs.fails("prepare", *images, "--out", str(empty / "pool"))
    assert "no pool there" in jobs.fails("prepare", *images, "--out", "other", "--append")
    assert "are for pools" in jobs.fails("prepare", "--source", "shapes", "--out", "set", "--append")


def test_checkpoints(jobs: Jobs, shapes: str, tmp_path: Path) -> None:
    assert "no checkpoint there" in jobs.fails("evaluate", str(tmp_path), "--data", shapes)
    assert "--mode: invalid choice: 'slide'" in jobs.fails("evaluate", str(tmp_path), "--mode", "slide")
    assert "--scales: invalid float value: 'x'" in jobs.fails("evaluate", str(tmp_path), "--scales", "x")
    assert "--window: expected 2 arguments" in jobs.fails("evaluate", str(tmp_path), "--window", "9")


class TestS3:
    def test_wrong_key_bucket_endpoint(self, jobs: Jobs, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        def said(uri: str) -> str:
            began = time.monotonic()
            line = jobs.fails("train", "--data", uri)
            assert time.monotonic() - began < 10
            assert uri in line
            return line

        assert "bucket nowhere does not exist" in said("s3://nowhere/set")
        assert "no dataset there" in said("s3://data/nothing")
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
            monkeypatch.setenv(name, "mistaken")
            storage.reconnect()
            line = said("s3://data/nothing")
            assert name in line
            assert "mistaken" not in line
            assert s3.environment()["AWS_SECRET_ACCESS_KEY"] not in line
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        began = time.monotonic()
        assert "AWS_ENDPOINT_URL" in jobs.fails("train", "--data", "s3://data/nothing")
        assert time.monotonic() - began < 15

    def test_results_that_may_not_be_written(
        self, jobs: Jobs, s3: S3Server, shapes: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
        storage.reconnect()
        line = jobs.fails("train", "--preset", "demo", "--split", "1_16", "--data", shapes, "--out", "s3://data/run")
        assert "access denied" in line


def _tree(root: Path, image: bytes | None = None, mask: np.ndarray | None = None) -> Path:
    """A VOC tree of three images, of which the first may be spoilt."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(root / f"JPEGImages/{name}.jpg")
        Image.fromarray(rng.integers(0, 3, (20, 30), np.uint8)).save(root / f"SegmentationClass/{name}.png")
    if image is not None:
        (root / "JPEGImages/a.jpg").write_bytes(image)
    if mask is not None:
        Image.fromarray(mask).save(root / "SegmentationClass/a.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("c\n")
    return root


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        ({"mask": np.full((20, 30), 9, np.uint8)}, ["a.png", "9"]),
        ({"mask": np.zeros((10, 30), np.uint8)}, ["a.png", "30x10", "30x20"]),
        ({"image": b"<html>not found</html>"}, ["a.jpg", "unreadable"]),
    ],
)
def test_bad_samples(jobs: Jobs, tmp_path: Path, spoil: dict, named: list[str]) -> None:
    root = _tree(tmp_path / "tree", **spoil)
    flags = ["--source", "voc", "--root", str(root), "--classes", "x,y,z", "--out", str(tmp_path / "out")]
    line = jobs.fails("prepare", *flags)
    assert [word for word in named if word not in line] == [], line
    assert not (tmp_path / "out" / "dataset.json").exists()
