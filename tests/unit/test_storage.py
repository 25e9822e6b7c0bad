import errno
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pipeline import storage
from pipeline.errors import UserError
from tests.s3 import READER_KEY, READER_SECRET, free_ports

# ---- the same on every storage --------------------------------------------------------------------------------


def test_write_read_list_delete(root):
    place = storage.join(root, "a", "b.bin")
    assert not storage.exists(place)
    assert storage.list_files(root) == []
    storage.write_bytes(place, b"one")
    storage.write_bytes(place, b"two")
    storage.write_bytes(storage.join(root, "c"), b"")
    assert storage.read_bytes(place) == b"two"
    assert storage.read_bytes(storage.join(root, "c")) == b""
    assert storage.exists(place)
    assert not storage.exists(storage.join(root, "a"))  # a folder is no file
    assert storage.list_files(root) == ["a/b.bin", "c"]
    assert storage.file_sizes(root) == {"a/b.bin": 3, "c": 0}
    storage.delete(storage.join(root, "a"))
    storage.delete(storage.join(root, "nothing"))
    assert storage.list_files(root) == ["c"]


def test_an_empty_folder_goes_and_no_other(root):
    place = storage.join(root, "a", "b.bin")
    storage.write_bytes(place, b"one")
    storage.delete_empty(storage.join(root, "a"))
    storage.delete_empty(storage.join(root, "nothing"))
    assert storage.list_files(root) == ["a/b.bin"]
    storage.delete(place)
    storage.delete_empty(storage.join(root, "a"))
    filesystem, path = storage.resolve(storage.join(root, "a"))
    assert filesystem.get_file_info(path).type == pafs.FileType.NotFound


def test_a_missing_file_is_one_line(root):
    with pytest.raises(UserError, match="nothing: not found") as error:
        storage.read_bytes(storage.join(root, "nothing"))
    assert "\n" not in str(error.value)


def test_check_writable_leaves_nothing(root):
    storage.check_writable(root)
    assert storage.list_files(root) == []


# ---- local ----------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    place = str(tmp_path / "file")
    storage.write_bytes(place, b"old")

    def full(self: Path, target: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="file: no space is left on the disk"):
        storage.write_bytes(place, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert storage.read_bytes(place) == b"old"


def test_a_write_over_a_folder_leaves_no_file(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder"):
        storage.write_bytes(str(tmp_path / "folder"), b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    place = str(tmp_path / "file")
    storage.write_bytes(place, b"old")
    seen = []
    replace = Path.replace

    def watched(self: Path, target: str) -> Path:
        seen.append((storage.read_bytes(place), self.read_bytes()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    storage.write_bytes(place, b"new")
    assert seen == [(b"old", b"new")]


def test_no_permission_is_one_line(tmp_path, monkeypatch):
    def denied(self: object, path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    class Denied(pafs.LocalFileSystem):
        open_input_stream = denied  # type: ignore[assignment]

    monkeypatch.setattr(storage, "resolve", lambda uri: (Denied(), uri))
    with pytest.raises(UserError, match="permission denied"):
        storage.read_bytes(str(tmp_path / "file"))


def test_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # else the bucket's region is looked up
    assert storage.absolute("runs/a") == f"{tmp_path}/runs/a"
    assert storage.absolute("file:///a/b") == "/a/b"
    assert storage.absolute("~/a") == "/home/someone/a"
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert storage.is_local("a/b")
    assert storage.is_local("file:///a")
    assert not storage.is_local("s3://bucket/a")


@pytest.mark.parametrize("part", ["/etc/passwd", "..", "a/../../b", "../a", "a\\b", "a\0b"])
def test_join_refuses_what_leads_out(part):
    with pytest.raises(UserError, match="leads out of"):
        storage.join("s3://bucket/data", "shards", part)


def test_join_keeps_what_stays_inside():
    assert storage.join("s3://bucket/data/", "a..b", "c/d") == "s3://bucket/data/a..b/c/d"


# ---- URIs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["s3://key:secret@bucket/a", "s3://bucket/a?access_key=key&secret_key=secret"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri):
    with pytest.raises(UserError, match="no credentials or options in a URI") as error:
        storage.resolve(uri)
    assert "secret" not in str(error.value)
    assert "bucket" in str(error.value)


def test_the_rest_of_a_key_is_kept(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert storage.resolve("s3://bucket/run#2/a b")[1] == "bucket/run#2/a b"
    assert storage.resolve("s3://bucket//a/")[1] == "bucket/a"
    storage.reconnect()


def test_unknown_scheme_and_missing_bucket():
    with pytest.raises(UserError, match="nope://: cannot open"):
        storage.resolve("nope://x/y")
    with pytest.raises(UserError, match="no bucket named"):
        storage.resolve("s3:///a")


def test_fsspec_opens_the_rest():
    storage.write_bytes("memory://place/a", b"x")
    assert storage.read_bytes("memory://place/a") == b"x"


# ---- S3 mistakes ----------------------------------------------------------------------------------------------


def _refused(uri: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        storage.write_bytes(f"{uri}/x", b"x")
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(("key", "secret"), [("nobody", "trainer-secret"), ("trainer-key", "wrong-secret")])
def test_wrong_key(bucket, monkeypatch, key, secret):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    _refused(bucket, "access denied: check AWS_ACCESS_KEY_ID")


def test_a_reader_may_read_and_not_write(bucket, monkeypatch):
    storage.write_bytes(f"{bucket}/a", b"x")
    storage.reconnect()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    assert storage.read_bytes(f"{bucket}/a") == b"x"
    _refused(bucket, "access denied")


def test_wrong_bucket(bucket):
    _refused("s3://no-such-bucket/a", "bucket does not exist")
    with pytest.raises(UserError, match="bucket no-such-bucket does not exist"):
        storage.exists("s3://no-such-bucket/a")


def test_wrong_endpoint(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(UserError, match="the endpoint does not answer: check AWS_ENDPOINT_URL"):
        storage.read_bytes(f"{bucket}/a")


def _put(root: str, count: int) -> dict[str, int]:
    names = {f"{number % 3}/{number:04d}.jpg": number % 7 for number in range(count)}
    for name, size in names.items():
        storage.write_bytes(storage.join(root, name), bytes(size))
    return names


def test_files_are_listed_one_by_one(tmp_path):
    names = _put(str(tmp_path), 30)
    assert dict(storage.iter_files(str(tmp_path))) == names
    with pytest.raises(UserError, match="nowhere: not found"):
        next(storage.iter_files(str(tmp_path / "nowhere")))


def test_files_on_s3_are_listed_page_by_page(s3):
    names = _put(f"{s3.bucket_uri}/listed", 1100)  # a page holds 1000
    _put(f"{s3.bucket_uri}/listed-not", 1)
    listing = storage.iter_files(f"{s3.bucket_uri}/listed")
    first = next(listing)
    assert dict([first, *listing]) == names
    assert list(storage.iter_files(f"{s3.bucket_uri}/nothing")) == []
    with pytest.raises(UserError, match="the bucket nowhere does not exist"):
        next(storage.iter_files("s3://nowhere/x"))
    ranges = [storage.read_range(f"{s3.bucket_uri}/listed/0/0006.jpg", offset, 4) for offset in (0, 3, 5)]
    assert list(map(len, ranges)) == [4, 3, 1]


def test_files_of_any_other_storage_are_listed():
    names = _put("memory://listed/a", 9)
    assert dict(storage.iter_files("memory://listed/a")) == names
    assert storage.read_range("memory://listed/a/0/0006.jpg", 1, 3) == bytes(3)
