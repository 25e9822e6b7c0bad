"""Pools on real Ray and a real S3 server: made, added to, killed half-way, and trained from."""

import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from pipeline import checkpoint, storage
from pipeline.config import cli
from pipeline.config.schema import Config, read_file
from pipeline.datasets.pools.make import make_pool
from pipeline.datasets.pools.pool import Pool, open_pool
from pipeline.errors import UserError
from pipeline.ingest import read
from pipeline.ingest.groups import PoolTable
from pipeline.ingest.order import LanePlan
from pipeline.ingest.read import read_inline, read_ray
from pipeline.methods import OPTIONS
from pipeline.patience import Patience
from pipeline.training.launch import launch
from tests.processes import wait_for
from tests.s3 import S3Server

REPO = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("node_environment", "ray_cluster")


@pytest.fixture(scope="module")
def node_environment(s3_server: S3Server) -> Iterator[None]:
    """What the nodes of a cluster know of the storage; set before Ray starts, as its workers inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in s3_server.environment().items():
            patch.setenv(key, value)
        yield


def photo(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def photos(root: str, numbers: range) -> dict[str, bytes]:
    """Plain JPEGs in two folders below `root`, by id."""
    found = {f"{number % 2}/{number:04d}.jpg": photo(number) for number in numbers}
    for name, data in found.items():
        storage.write_bytes(storage.join(root, name), data)
    return found


def rows(pool: Pool, generations: int = 1) -> dict[str, bytes]:
    """One epoch of a pool as a run reads it: all rows, none twice."""
    table = PoolTable(pool, generations)
    found: dict[str, bytes] = {}
    for unit, served in read_inline(LanePlan(table, 1, 0).units(range(1), 0), None, Patience()):
        if unit.epoch:
            break
        assert not found.keys() & set(served["id"].to_pylist())
        found.update(zip(served["id"].to_pylist(), served["image"].to_pylist(), strict=True))
    return found


def test_images_on_s3_and_more_of_them(s3: S3Server) -> None:
    raw, out = f"{s3.bucket_uri}/photos", f"{s3.bucket_uri}/pools/photos"
    first = photos(raw, range(100))
    pool = make_pool("images", raw, out)
    assert rows(pool) == first
    assert not [file for file in storage.list_files(out) if file.startswith("work")]
    second = photos(raw, range(100, 130))
    pool = make_pool("images", raw, out, append=True)
    assert [each.rows for each in pool.info.generations] == [100, 30]
    assert rows(pool, 1) == first
    assert rows(pool, 2) == {**first, **second}
    assert rows(make_pool("images", raw, f"{out}-copy", copy=True)) == {**first, **second}


def test_ray_reads_what_the_plan_says(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Ray Data, from links and bytes, in the order of the inline reader."""
    monkeypatch.setattr(read, "ITEM_ROWS", 16)
    raw = f"{s3.bucket_uri}/mixed"
    photos(raw, range(60))
    for copy in (False, True):
        pool = make_pool("images", raw, f"{s3.bucket_uri}/pools/mixed-{copy}", copy=copy)
        plan = LanePlan(PoolTable(pool, 1), 4, 0)
        tables = zip(
            *(each(plan.units(range(4), 3), None, Patience()) for each in (read_ray, read_inline)), strict=False
        )
        for _, ((one, found), (two, expected)) in zip(range(70), tables, strict=False):
            assert one == two
            assert found.to_pylist() == expected.to_pylist()


def test_tar_and_parquet_on_s3(s3: S3Server) -> None:
    images = [photo(number) for number in range(60)]
    for number in range(3):
        tar, parquet = io.BytesIO(), pa.BufferOutputStream()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            for key in range(20):
                info = tarfile.TarInfo(f"{key:03d}.jpg")
                info.size = len(images[20 * number + key])
                archive.addfile(info, io.BytesIO(images[20 * number + key]))
        column = pa.array([{"bytes": image} for image in images[20 * number : 20 * number + 20]])
        pq.write_table(pa.table({"image": column}), parquet, row_group_size=7)
        storage.write_bytes(f"{s3.bucket_uri}/tars/{number}.tar", tar.getvalue())
        storage.write_bytes(f"{s3.bucket_uri}/parquet/{number}.parquet", parquet.getvalue().to_pybytes())
    linked = rows(make_pool("tar", f"{s3.bucket_uri}/tars", f"{s3.bucket_uri}/pools/tars"))
    assert linked == {f"{n // 20}.tar/{n % 20:03d}.jpg": image for n, image in enumerate(images)}
    repacked = rows(make_pool("parquet", f"{s3.bucket_uri}/parquet", f"{s3.bucket_uri}/pools/parquet"))
    assert repacked == {f"{n // 20}.parquet#{n % 20 // 7}.{n % 20 % 7}": image for n, image in enumerate(images)}


def test_killed_and_started_again(s3: S3Server, tmp_path: Path) -> None:
    raw, out = f"{s3.bucket_uri}/killed", f"{s3.bucket_uri}/pools/killed"
    expected = photos(raw, range(1000))
    command = [sys.executable, str(REPO / "jobs/prepare.py"), "--source", "images", "--root", raw, "--out", out]
    command += ["--copy", "--workers", "1"]
    address = ray.get_runtime_context().gcs_address
    env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(REPO)}
    killed = subprocess.Popen(command, env=env, cwd=tmp_path)
    wait_for("a part", lambda: parts(out) or killed.poll() is not None)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = parts(out)
    with pytest.raises(UserError, match="prepare did not finish; run it again"):
        open_pool(out)
    again = subprocess.run(command, env=env, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "1000 images in 1 generations" in again.stdout
    assert done.items() <= parts(out).items(), "written once only"
    assert rows(open_pool(out)) == expected
    refused = subprocess.run(command, env=env, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--append adds new images" in refused.stderr


def parts(out: str) -> dict[str, object]:
    """When each part was written."""
    filesystem, path = storage.resolve(out)
    files = [file for file in storage.list_files(out) if "/part-" in file]
    return {file: filesystem.get_file_info(f"{path}/{file}").mtime for file in files}


def configured(*flags: str) -> Config:
    short = ["--preset", "demo", "--split", "1_16", "--run.log_every", "1", "--run.tensorboard", "false"]
    return cli.parse_config([*short, "--u2pl.warmup", "2", *flags], "test", OPTIONS)[0]


def test_a_pool_of_plain_jpegs_trains(
    s3: S3Server, shapes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No image of it has a mask; while it grows, a run goes on with what it began with."""
    raw, out = f"{s3.bucket_uri}/train", f"{s3.bucket_uri}/pools/train"
    photos(raw, range(40))
    make_pool("images", raw, out)
    run = str(tmp_path / "run")
    flags = ("--data", shapes, "--data.unlabeled_pools", out, "--out", run, "--scaling.workers", "2")
    progress = launch(configured(*flags, "--data.pool_weights", "1", "1", "--optim.steps", "6"))
    assert progress.step == 6
    assert f"from {out} (40 images, generations 1 to 1)" in capsys.readouterr().out
    assert checkpoint.read_meta(checkpoint.find(run)).data["pools"] == [[open_pool(out).digest(1), 1]]
    photos(raw, range(40, 60))
    make_pool("images", raw, out, append=True)
    launch(configured(*flags, "--data.pool_weights", "1", "1", "--optim.steps", "6"))
    assert "is finished" in capsys.readouterr().out
    assert read_file(f"{run}/config.yaml")["data"]["pool_generations"] == ["1"]
    with pytest.raises(UserError, match=r"data\.unlabeled_pools .* instead of .*--fresh"):
        launch(configured("--data", shapes, "--out", run, "--optim.steps", "6"))
