from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import storage, versions
from pipeline.errors import UserError
from pipeline.versions import NOTHING
from tests.proxy import FaultProxy
from tests.s3 import READER_KEY, READER_SECRET


def test_each_version_follows_the_one_that_its_writer_knew(root):
    uri = storage.join(root, "who")
    assert versions.read(uri) == NOTHING
    assert versions.write(uri, b"first", NOTHING)
    first = versions.read(uri)
    assert first.data == b"first"
    assert versions.write(uri, b"second", first)
    second = versions.read(uri)
    assert not versions.write(uri, b"late", first)
    assert not versions.write(uri, b"late", NOTHING)
    assert versions.read(uri) == second
    assert second.tag != first.tag


def test_of_many_writers_one_comes_through(root):
    uri, known = storage.join(root, "who"), NOTHING
    with ThreadPoolExecutor(16) as pool:
        for _ in range(8):
            texts = [f"{known.tag}-{each}".encode() for each in range(16)]
            written = list(pool.map(lambda text, known=known: versions.write(uri, text, known), texts))
            assert sum(written) == 1
            known = versions.read(uri)
            assert known.data == texts[written.index(True)]


def test_a_disk_keeps_the_newest_alone(tmp_path):
    uri, known = str(tmp_path / "who"), NOTHING
    for text in (b"1", b"2", b"3"):
        assert versions.write(uri, text, known)
        known = versions.read(uri)
    assert [file.read_bytes() for file in (tmp_path / "who").iterdir()] == [b"3"]


def test_a_name_that_has_become_free_again_is_not_taken(tmp_path):
    """Whoever knows the first of three versions could create the second one anew, as its file is gone."""
    uri = str(tmp_path / "who")
    versions.write(uri, b"1", NOTHING)
    first = versions.read(uri)
    versions.write(uri, b"2", first)
    versions.write(uri, b"3", versions.read(uri))
    assert not versions.write(uri, b"late", first)
    assert versions.read(uri).data == b"3"


def test_a_writer_that_died_before_its_first_byte_stands_in_nobodys_way(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "WRITING_SECONDS", 0.05)
    uri = str(tmp_path / "who")
    versions.write(uri, b"1", NOTHING)
    (tmp_path / "who" / "00000002").touch()
    dead = versions.read(uri)
    assert dead.data == b""
    assert versions.write(uri, b"3", dead)
    assert versions.read(uri).data == b"3"


def test_a_lost_answer_is_no_lost_race(bucket):
    """A client that asks again after a broken connection finds its own version there."""
    uri = f"{bucket}/who"
    assert versions.write(uri, b"mine", NOTHING)
    assert versions.write(uri, b"mine", NOTHING)


def test_storage_of_fsspec(tmp_path):
    uri = f"memory://{tmp_path.name}/who"
    assert versions.write(uri, b"1", NOTHING)
    known = versions.read(uri)
    assert versions.write(uri, b"2", known)
    assert not versions.write(uri, b"late", known)
    assert versions.read(uri).data == b"2"


def test_what_is_wrong_with_a_bucket_or_a_key_is_one_line(bucket, monkeypatch):
    missing = "s3://no-such-bucket/who"
    with pytest.raises(UserError, match="no-such-bucket/who: the bucket does not exist"):
        versions.write(missing, b"1", NOTHING)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    storage.reconnect()
    with pytest.raises(UserError, match="who: access denied: check AWS_ACCESS_KEY_ID"):
        versions.write(f"{bucket}/who", b"1", NOTHING)


def test_a_wrong_clock_is_named_by_both_clients(s3, bucket, monkeypatch):
    uri, clock = f"{bucket}/who", "this machine's clock is wrong: set it"
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage.reconnect()
        versions.write(uri, b"1", NOTHING)
        known = versions.read(uri)
        proxy.set("skewed")
        for call in (
            lambda: versions.read(uri),
            lambda: versions.write(uri, b"2", known),
            lambda: storage.write_bytes(uri, b"2"),
            lambda: storage.list_files(bucket),
        ):
            with pytest.raises(UserError, match=rf"^{bucket}\S*: {clock}, as S3 [^\n]*$"):
                call()
        with pytest.raises(UserError, match=r"access denied: check AWS_ACCESS_KEY_ID .* and this machine's clock$"):
            storage.read_bytes(uri)  # begins with HEAD, whose answer says no more than 403
        proxy.set()
        assert versions.read(uri) == known


def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file is in the way"):
        versions.write(str(Path(tmp_path) / "file" / "who"), b"1", NOTHING)
