"""Downloads through torchvision itself, from a server on this machine that holds archives of a few files."""

import hashlib
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from torchvision.datasets import SBDataset, voc

from pipeline.datasets.raw.flags import download_sbd, download_voc, parse, read_raw
from pipeline.errors import UserError


class Server(ThreadingHTTPServer):
    """Serves a folder and counts the requests."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                asked.append(self.path)

        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))


@pytest.fixture
def server(trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The authors' server: VOC in which a0 is for training and v0 to score, and SBD with a mask for e0."""
    served = tmp_path / "served"
    trees.voc(served / "raw/VOCdevkit/VOC2012", train=1, val=1, extra=1)
    trees.sbd(served / "raw/benchmark_RELEASE/dataset", train="e0", val="v0")
    (served / "raw/benchmark_RELEASE/dataset/inst").mkdir()
    with tarfile.open(served / "voc.tar", "w") as archive:
        archive.add(served / "raw/VOCdevkit", "VOCdevkit")
    with tarfile.open(served / "sbd.tgz", "w:gz") as archive:
        archive.add(served / "raw/benchmark_RELEASE", "benchmark_RELEASE")
    with Server(served) as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{running.server_port}"
        digest = {name: hashlib.md5((served / name).read_bytes()).hexdigest() for name in ("voc.tar", "sbd.tgz")}
        entry = {**voc.DATASET_YEAR_DICT["2012"], "url": f"{url}/voc.tar", "md5": digest["voc.tar"]}
        monkeypatch.setitem(voc.DATASET_YEAR_DICT, "2012", entry)
        monkeypatch.setattr(SBDataset, "url", f"{url}/sbd.tgz")
        monkeypatch.setattr(SBDataset, "md5", digest["sbd.tgz"])
        yield running
        running.shutdown()
        thread.join()


def test_the_augmented_set_from_nothing(server, tmp_path):
    flags = ["--source", "voc", "--download", "--root", f"{tmp_path}/voc", "--sbd", f"{tmp_path}/sbd", "--out", "x"]
    samples, spec, _ = read_raw(parse(flags, None))
    assert {each.id: (each.subset, (each.mask_uri or "")[-3:]) for each in samples} == {
        "a0": ("train", "png"),
        "e0": ("train", "mat"),
        "v0": ("val", "png"),
    }
    assert len(spec.classes) == 21
    asked = len(server.asked)
    assert read_raw(parse(flags, None))[:2] == (samples, spec)
    assert len(server.asked) == asked, "nothing is fetched twice"


def test_an_unreachable_server_is_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setitem(voc.DATASET_YEAR_DICT["2012"], "url", "http://127.0.0.1:9/voc.tar")
    with pytest.raises(UserError, match=r"VOC2012 could not be downloaded to .*refused.*; try again") as error:
        download_voc(str(tmp_path / "voc"))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(SBDataset, "url", f"http://127.0.0.1:{server.server_port}/moved.tgz")
    with pytest.raises(UserError, match=r"SBD could not be downloaded .*404"):
        download_sbd(str(tmp_path / "sbd"))


def test_a_damaged_archive_is_fetched_again(server, tmp_path, monkeypatch):
    right = voc.DATASET_YEAR_DICT["2012"]["md5"]
    monkeypatch.setitem(voc.DATASET_YEAR_DICT["2012"], "md5", "0" * 32)
    with pytest.raises(UserError, match="corrupted"):
        download_voc(str(tmp_path / "voc"))
    assert not (tmp_path / "voc/VOCdevkit").exists()
    monkeypatch.setitem(voc.DATASET_YEAR_DICT["2012"], "md5", right)
    assert (Path(download_voc(str(tmp_path / "voc"))) / "JPEGImages/a0.jpg").exists()


def test_mistakes_are_named(server, trees, tmp_path):
    with pytest.raises(UserError, match="s3://bucket/voc: --download unpacks to a disk"):
        download_voc("s3://bucket/voc")
    trees.sbd(tmp_path / "sbd", train="a", val="b")
    with pytest.raises(UserError, match="sbd/cls: is there already; use it without --download"):
        download_sbd(str(tmp_path / "sbd"))
    with pytest.raises(UserError, match="--download fetches VOC 2012"):
        parse(["--source", "cityscapes", "--download", "--root", "x", "--out", "y"], None)
    assert server.asked == []
