"""Requests to S3, counted by a proxy: what reading costs where each answer takes its time."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.datasets.images import encode_png
from pipeline.datasets.pools import make
from pipeline.datasets.pools.pool import FETCHES, open_pool
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.ingest.groups import LABELED, Group, PoolTable, select_groups, select_images
from pipeline.ingest.read import read_rows
from pipeline.patience import Patience
from tests.proxy import FaultProxy
from tests.s3 import S3Server


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        storage.reconnect()
        yield found
        storage.reconnect()


def uploaded(folder: str, uri: str) -> str:
    for file in storage.list_files(folder):
        storage.write_bytes(f"{uri}/{file}", storage.read_bytes(f"{folder}/{file}"))
    return uri


def requests(proxy: FaultProxy, groups: list[Group]) -> int:
    proxy.counts.clear()
    for group in groups:
        read_rows(group, None, Patience())
    return proxy.counts["pass"]


def test_a_row_group_of_a_dataset_is_one_request(shapes: str, s3: S3Server, proxy: FaultProxy) -> None:
    """And the first of each shard one more: how large is it?"""
    dataset = open_dataset(uploaded(shapes, f"{s3.bucket_uri}/requests-shapes"))
    groups = list(select_groups(dataset, dataset.subset("train")["id"].to_pylist()))
    assert requests(proxy, groups) == len(groups) + len({group.shard for group in groups})
    assert requests(proxy, groups) == len(groups)
    split = load_split(dataset, "1_4")
    unlabeled = list(select_groups(dataset, split.unlabeled))
    assert requests(proxy, unlabeled) <= 1.1 * len(unlabeled)  # two where most rows of a group are labeled
    images = list(select_images(dataset, split.labeled, LABELED))
    assert requests(proxy, images) <= 2 * len(images)


@pytest.mark.parametrize("kind", ["bytes", "tar", "images"])
def test_a_row_group_or_link_of_a_pool(kind: str, s3: S3Server, proxy: FaultProxy, tmp_path: Path) -> None:
    """The first use of a file costs more; a file that holds one image is used once an epoch."""
    raw = tmp_path / "raw"
    raw.mkdir()
    pictures = {f"{number:02d}.png": encode_png(np.full((24, 32, 3), number, np.uint8)) for number in range(20)}
    if kind == "tar":
        with tarfile.open(raw / "a.tar", "w") as tar:
            for name, data in pictures.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    else:
        for name, data in pictures.items():
            (raw / name).write_bytes(data)
    root = f"{s3.bucket_uri}/requests-{kind}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make.tasks, "run", lambda task, items, *_: map(task, items))
        source = "tar" if kind == "tar" else "images"
        make.make_pool(source, uploaded(str(raw), f"{root}/raw"), f"{root}/pool", copy=kind == "bytes")
    table = PoolTable(open_pool(f"{root}/pool"), 1)
    groups = [table[number] for number in range(len(table))]
    files = len({group.shard for group in groups})
    assert len(groups) > 1
    storage.reconnect()
    first, again = requests(proxy, groups), requests(proxy, groups)
    if kind == "bytes":
        assert (first, again) == (len(groups) + 2 * files, len(groups))
    else:  # size and footer of the lists of links, then the links: size and bytes
        assert again == len(groups) + len(pictures)
        sizes = first - again - 2 * files
        # threads that come to a file at once each ask for its size
        assert 1 <= sizes <= FETCHES if kind == "tar" else sizes == len(pictures)
