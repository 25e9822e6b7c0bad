"""Prepare on real Ray: many shards at a time, killed and started again, and what it refuses."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from scipy.io import savemat

from pipeline import storage
from pipeline.datasets.prepared.dataset import open_dataset, read_group
from pipeline.datasets.prepared.prepare import prepare
from pipeline.datasets.prepared.splits import load_split
from pipeline.datasets.raw.layouts import Folders, RawSample, read_folder, read_voc
from pipeline.datasets.specs import DatasetSpec, voc_palette
from pipeline.errors import UserError
from tests.s3 import S3Server

REPO = Path(__file__).parents[2]
FACTS = DatasetSpec(classes=("ground", "thing"), palette=voc_palette(2))
TRAIN, VAL = 96, 8

pytestmark = pytest.mark.usefixtures("node_environment", "ray_cluster")


@pytest.fixture(scope="module")
def node_environment(s3_server: S3Server) -> Iterator[None]:
    """What the nodes of a cluster know of the storage; set before Ray starts, as its workers inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in s3_server.environment().items():
            patch.setenv(key, value)
        yield


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> str:
    """A folder tree of 96 + 8 images; every eighth train image lacks a mask."""
    root = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for number in range(TRAIN + VAL):
        name = f"train/{number:03d}.png" if number < TRAIN else f"val/{number:03d}.png"
        storage.write_bytes(f"{root}/images/{name}", png(rng.integers(0, 255, (96, 128, 3), np.uint8)))
        if number % 8 or number >= TRAIN:
            storage.write_bytes(f"{root}/masks/{name}", png(rng.integers(0, 2, (96, 128), np.uint8)))
    return str(root)


def check(root: str, tree: str) -> None:
    """Every sample is there once, with its own bytes."""
    dataset = open_dataset(root)
    assert dataset.info.counts == {"train": TRAIN, "val": VAL}
    assert len(set(dataset.index["id"].to_pylist())) == TRAIN + VAL
    for shard, group in {(row["shard"], row["row_group"]) for row in dataset.index.to_pylist()}:
        for row in read_group(root, shard, group, ["id", "image", "mask"]).to_pylist():
            assert row["image"] == storage.read_bytes(f"{tree}/images/{row['id']}.png")
            assert (row["mask"] is None) == (not storage.exists(f"{tree}/masks/{row['id']}.png"))
    assert len(load_split(dataset, "full").labeled) == 84


def test_parallel_run(tree, tmp_path, capfd):
    root = str(tmp_path / "out")
    info = prepare(read_folder(Folders(tree)), root, name="tiny", spec=FACTS)
    check(root, tree)
    assert len([shard for shard in info.shards if "train" in shard]) == 8
    assert "prepare: 10 of 10 shards" in capfd.readouterr().out
    ids = open_dataset(root).index["id"].to_pylist()
    assert ids[:TRAIN] != sorted(ids[:TRAIN]), "rows are shuffled"
    assert not storage.list_files(f"{root}/parts")


def test_the_result_does_not_depend_on_the_workers(tree, tmp_path):
    infos = [
        prepare(read_folder(Folders(tree)), str(tmp_path / str(workers)), name="tiny", spec=FACTS, workers=workers)
        for workers in (1, 2)
    ]
    assert infos[0] == infos[1]
    other = prepare(read_folder(Folders(tree)), str(tmp_path / "seed"), name="tiny", spec=FACTS, seed=1)
    assert other.index_hash != infos[0].index_hash


def test_finished_datasets_are_not_overwritten(tree, tmp_path):
    root = str(tmp_path / "out")
    samples = read_folder(Folders(tree))
    info = prepare(samples, root, name="tiny", spec=FACTS)
    with pytest.raises(UserError, match="pass --overwrite"):
        prepare(samples, root, name="tiny", spec=FACTS, seed=1)
    assert open_dataset(root).info == info
    assert prepare(samples, root, name="other", spec=FACTS, seed=1, overwrite=True).name == "other"
    check(root, tree)


def job(*flags: str) -> list[str]:
    return [sys.executable, str(REPO / "jobs/prepare.py"), *flags]


def job_environment() -> dict[str, str]:
    address = ray.get_runtime_context().gcs_address
    return {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(REPO)}


def test_killed_and_started_again(tree, tmp_path):
    root = tmp_path / "out"
    flags = ("--source", "folder", "--root", tree, "--classes", "ground,thing", "--out", str(root))
    killed = subprocess.Popen(job(*flags, "--workers", "1"), env=job_environment(), cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(root.glob("shards/*.json")):
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with pytest.raises(UserError, match="prepare did not finish; run it again"):
        open_dataset(str(root))
    time.sleep(2)  # Ray ends the dead driver's tasks
    done = {file.stem: (root / f"shards/{file.stem}.parquet").stat() for file in root.glob("shards/*.json")}
    assert len(done) < 10
    again = subprocess.run(
        job(*flags), env=job_environment(), cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert re.search(rf"out: {TRAIN} train \(\d+ with a mask\), {VAL} val, 0 skipped$", again.stdout)
    for stem, before in done.items():
        assert (root / f"shards/{stem}.parquet").stat().st_mtime_ns == before.st_mtime_ns, "written once only"
    check(str(root), tree)


def test_bad_samples_are_named_and_counted(tree, tmp_path):
    bad = {"cut.png": png(np.zeros((96, 128, 3), np.uint8))[:-40], "html.jpg": b"<html>"}
    for name, data in bad.items():
        storage.write_bytes(f"{tmp_path}/bad/{name}", data)
    storage.write_bytes(f"{tmp_path}/bad/wide.png", png(np.zeros((96, 129), np.uint8)))
    good = read_folder(Folders(tree))
    samples = [
        *good,
        *(RawSample(name, "train", f"{tmp_path}/bad/{name}", None) for name in bad),
        RawSample("wide", "train", good[1].image_uri, f"{tmp_path}/bad/wide.png"),
    ]
    root = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"bad/cut.png: unreadable image .*; 2 more bad samples; .*--skip_bad"):
        prepare(samples, root, name="tiny", spec=FACTS)
    with pytest.raises(UserError, match="did not finish"):
        open_dataset(root)
    assert prepare(samples, root, name="tiny", spec=FACTS, skip_bad=True).skipped == 3
    check(root, tree)


def test_wrong_classes_stop_early(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.datasets.prepared.prepare.MAX_BAD", 5)
    spec = DatasetSpec(classes=("ground",), palette=voc_palette(1))
    with pytest.raises(UserError, match=r"holds 1 at .*; at least \d+ more bad samples"):
        prepare(read_folder(Folders(tree)), str(tmp_path / "out"), name="tiny", spec=spec)


def test_pool_without_masks(tree, tmp_path):
    pool = [RawSample(each.id, "train", each.image_uri, None) for each in read_folder(Folders(tree))]
    info = prepare(pool, str(tmp_path / "pool"), name="pool", spec=FACTS)
    assert (info.counts["train"], info.counts["val"], info.protocol) == (TRAIN + VAL, 0, "")
    with pytest.raises(UserError, match="has no split lists"):
        load_split(open_dataset(str(tmp_path / "pool")), "1_2")


def test_published_lists_become_the_default(tree, tmp_path):
    lists = tmp_path / "lists"
    storage.write_bytes(f"{lists}/few/labeled.txt", b"images/train/001.png\nimages/train/002.png")
    root = str(tmp_path / "out")
    info = prepare(read_folder(Folders(tree)), root, name="tiny", spec=FACTS, release=(str(lists), "mine"))
    assert info.protocol == "mine"
    assert load_split(open_dataset(root), "few").labeled == ("train/001", "train/002")
    assert len(load_split(open_dataset(root), "1_2", "random").labeled) == 42
    storage.write_bytes(f"{lists}/few/labeled.txt", b"nobody")
    with pytest.raises(UserError, match="nobody is not in the dataset"):
        prepare(read_folder(Folders(tree)), str(tmp_path / "x"), name="tiny", spec=FACTS, release=(str(lists), "mine"))
    assert not (tmp_path / "x").exists(), "wrong lists show before the work begins"


def test_from_and_to_s3(tree, tmp_path, s3):
    raw, root = f"{s3.bucket_uri}/raw", f"{s3.bucket_uri}/prepared"
    for file in storage.list_files(tree):
        storage.write_bytes(f"{raw}/{file}", storage.read_bytes(f"{tree}/{file}"))
    prepare(read_folder(Folders(raw)), root, name="tiny", spec=FACTS)
    check(root, tree)
    with pytest.raises(UserError, match="pass --overwrite"):
        prepare(read_folder(Folders(raw)), root, name="tiny", spec=FACTS)
    assert prepare(read_folder(Folders(raw)), root, name="again", spec=FACTS, overwrite=True).name == "again"
    check(root, tree)


@pytest.fixture
def drawn_camvid(tmp_path) -> str:
    """CamVid's layout as a VOC tree, drawn: 22 train and 5 val images, palette masks of 11 classes and void."""
    rng = np.random.default_rng(0)
    palette = [channel for color in voc_palette(256) for channel in color]
    for subset, count in (("train", 22), ("val", 5)):
        names = [f"{subset}_{number:04d}" for number in range(count)]
        for name in names:
            mask = Image.fromarray(rng.choice([*range(11), 255], (45, 60)).astype(np.uint8))
            mask.putpalette(palette)
            for folder, picture, form in (
                ("JPEGImages", Image.fromarray(rng.integers(0, 255, (45, 60, 3), np.uint8)), "jpg"),
                ("SegmentationClass", mask, "png"),
            ):
                buffer = io.BytesIO()
                picture.save(buffer, "JPEG" if form == "jpg" else "PNG")
                storage.write_bytes(f"{tmp_path}/raw/{folder}/{name}.{form}", buffer.getvalue())
        storage.write_bytes(f"{tmp_path}/raw/ImageSets/Segmentation/{subset}.txt", "\n".join(names).encode())
    return f"{tmp_path}/raw"


def check_camvid(raw: str, root: Path, counts: dict[str, int]) -> None:
    flags = ("--source", "voc", "--root", raw, "--classes", "camvid", "--out", str(root))
    done = subprocess.run(job(*flags), env=job_environment(), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(str(root))
    assert dataset.info.counts == counts
    source = {each.id: each for each in read_voc(Folders(raw))}
    for row in dataset.index.to_pylist()[:: max(1, sum(counts.values()) // 8)]:
        table = read_group(dataset.root, row["shard"], row["row_group"], ["id", "image", "mask"])
        stored = table.slice(row["row"], 1).to_pylist()[0]
        assert stored["image"] == storage.read_bytes(source[stored["id"]].image_uri)
        mask = np.asarray(Image.open(io.BytesIO(stored["mask"])))
        assert np.array_equal(mask, np.asarray(Image.open(str(source[stored["id"]].mask_uri))))


def test_camvid_from_its_voc_tree(drawn_camvid, tmp_path):
    check_camvid(drawn_camvid, tmp_path / "camvid", {"train": 22, "val": 5})


@pytest.mark.camvid
def test_real_camvid(camvid, tmp_path):
    check_camvid(camvid, tmp_path / "camvid", {"train": 367, "val": 101})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--source", "vok", "--out", "x"), "invalid choice"),
        (("--source", "voc", "--out", "x", "--root", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(tmp_path, flags, words):
    """As a user sees it; the others are in test_bad_input.py."""
    done = run(tmp_path, *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert words in done.stderr


def run(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(job(*flags), env=job_environment(), cwd=tmp_path, check=False, capture_output=True, text=True)


def test_voc_with_sbd_masks(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2, (20, 30)).astype(np.uint8)
    for name in ("a", "b", "c"):
        storage.write_bytes(f"{tmp_path}/voc/JPEGImages/{name}.png", png(np.repeat(ids[..., None] * 9, 3, 2)))
    for name in ("a", "c"):
        storage.write_bytes(f"{tmp_path}/voc/SegmentationClass/{name}.png", png(ids))
    for name, listed in (("train", b"a"), ("val", b"c")):
        storage.write_bytes(f"{tmp_path}/voc/ImageSets/Segmentation/{name}.txt", listed)
    mat = io.BytesIO()
    savemat(mat, {"GTcls": {"Segmentation": 1 - ids}})
    for name in ("a", "b", "c"):
        storage.write_bytes(f"{tmp_path}/sbd/img/{name}.jpg", b"x")
        storage.write_bytes(f"{tmp_path}/sbd/cls/{name}.mat", mat.getvalue())
    storage.write_bytes(f"{tmp_path}/sbd/train.txt", b"a\nc")
    storage.write_bytes(f"{tmp_path}/sbd/val.txt", b"b")
    done = run(tmp_path, "--source", "voc", "--root", "voc", "--sbd", "sbd", "--out", "out")
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.info.counts == {"train": 2, "val": 1}
    masks = {}
    for row in dataset.index.to_pylist():
        stored = read_group(dataset.root, row["shard"], row["row_group"], ["mask"])["mask"][row["row"]].as_py()
        masks[row["id"]] = np.asarray(Image.open(io.BytesIO(stored)))
    assert np.array_equal(masks["a"], ids), "VOC's mask wins"
    assert np.array_equal(masks["b"], 1 - ids)
    assert np.array_equal(masks["c"], ids)


def test_colour_masks_with_a_value_map(tmp_path):
    rng = np.random.default_rng(0)
    for number, subset in enumerate(("train", "train", "val")):
        ids = rng.integers(0, 3, (20, 30))
        colors = np.array([[0, 0, 0], [255, 128, 0], [255, 255, 255]], np.uint8)[ids]
        storage.write_bytes(f"{tmp_path}/raw/images/{subset}/{number}.png", png(colors))
        storage.write_bytes(f"{tmp_path}/raw/masks/{subset}/{number}.png", png(colors))
    flags = ("--source", "folder", "--root", "raw", "--classes", "ground,thing", "--out", "out")
    done = run(tmp_path, *flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert (
        "mask is a colour picture; say what its colours are: --values '#000000=ID,#ff8000=ID,#ffffff=ID'" in done.stderr
    )
    done = run(tmp_path, *flags, "--values", "#000000=0,#ff8000=1,#ffffff=255")
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(str(tmp_path / "out"))
    for row in dataset.index.to_pylist():
        table = read_group(dataset.root, row["shard"], row["row_group"], ["image", "mask"])
        image, mask = (
            np.asarray(Image.open(io.BytesIO(table[name][row["row"]].as_py()))) for name in table.schema.names
        )
        assert np.array_equal(mask, np.select([image[..., 2] == 255, image[..., 0] == 255], [255, 1], 0))


def test_check(tree, tmp_path, s3):
    root = f"{s3.bucket_uri}/checked"
    prepare(read_folder(Folders(tree)), root, name="tiny", spec=FACTS)
    done = run(tmp_path, "--check", root)
    assert done.returncode == 0, done.stderr
    assert "Problems: none" in done.stdout
    assert "page check.html" in done.stdout
    assert (tmp_path / "check.html").read_text().count("data:image/png") == 8
    storage.delete(f"{root}/shards/train-00003.parquet")
    done = run(tmp_path, "--check", root, "--page", "again.html")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "1 problems, the first: shards/train-00003.parquet is missing" in done.stderr
    assert "shards/train-00003.parquet is missing" in (tmp_path / "again.html").read_text()
