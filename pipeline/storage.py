"""Where bytes live: a local path, `s3://bucket/prefix`, or any URI that pyarrow or fsspec opens.

Everything above this module handles URIs (plain strings) and passes those to other processes: a filesystem
object may carry credentials, a URI never does. Credentials come from the environment or the node's role.
"""

import contextlib
import errno
import os
import posixpath
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from pipeline.errors import UserError
from pipeline.patience import FAILING, UNREACHED, is_brief

CONNECT_TIMEOUT = 3.0
"""Seconds until an endpoint that does not answer counts as unreachable (pyarrow tries it several times)."""
REQUEST_TIMEOUT = 10.0
"""Seconds without a byte until a request is tried again."""
REQUEST_ATTEMPTS = 3
"""How often pyarrow itself makes a request, with pauses of seconds at most; what takes longer is up to `Patience`."""
KNOWN_OBJECTS = 256
"""Objects of S3 whose size a process remembers, so that a range of one is one request."""

_HINTS = (
    (("is a directory", "Is a directory"), "is a folder, where a file is expected"),
    (
        ("REQUEST_TIME_TOO_SKEWED", "RequestTimeTooSkewed"),
        "this machine's clock is wrong: set it, as S3 refuses requests whose time is off by more than minutes",
    ),
    (
        ("ACCESS_DENIED during Head",),  # the answer to HEAD has no room for the reason
        "access denied: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, what they may read and write, and this "
        "machine's clock",
    ),
    (
        (
            "ACCESS_DENIED",
            "AccessDenied",
            "SIGNATURE_DOES_NOT_MATCH",
            "INVALID_ACCESS_KEY",
            "InvalidAccessKeyId",
        ),
        "access denied: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and what they may read and write",
    ),
    (
        ("NO_SUCH_BUCKET", "NoSuchBucket", "Bucket does not exist"),
        "the bucket does not exist: create it or correct the name",
    ),
    (("KeyTooLong",), "the name is too long for the storage: choose a shorter one"),
    (UNREACHED, "the endpoint does not answer: check AWS_ENDPOINT_URL"),
    (FAILING, "the storage answers with errors of its own: it is overloaded or starting"),
)


_DISK_HINTS = {
    errno.ENOSPC: "no space is left on the disk: free some, or choose another place",
    errno.EDQUOT: "your quota of the disk is used up: free some space, or choose another place",
    errno.EROFS: "the disk is read-only: choose another place",
    errno.ENAMETOOLONG: "the name is too long for the disk: choose a shorter one",
}


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """Opens the filesystem of `uri`.

    Args:
        uri: a local path (relative or absolute, `~` allowed), `file://`, `s3://bucket/key`, or any URI that pyarrow
            or fsspec knows.

    Returns:
        The filesystem and the path inside it.

    Raises:
        UserError: the scheme is unknown, or the URI carries credentials.
    """
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme in ("", "file"):
        local = uri.removeprefix("file://")
        return pafs.LocalFileSystem(), str(Path(local).expanduser().absolute())
    place = uri.partition("://")[2]
    netloc = place.partition("/")[0]
    if "@" in netloc or "?" in place:
        bare = place.partition("?")[0].rpartition("@")[2]
        raise UserError(f"{scheme}://{bare}: no credentials or options in a URI; put them into the environment")
    path = posixpath.normpath(place) if netloc else place
    if scheme == "s3":
        return _s3(netloc, os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")), path
    return _other(scheme), path


@lru_cache(maxsize=32)
def _s3(bucket: str, endpoint: str) -> pafs.FileSystem:
    """The S3 filesystem. The bare constructor ignores AWS_ENDPOINT_URL, so it is read here."""
    if not bucket:
        raise UserError("s3://: no bucket named; write s3://bucket/prefix")
    retry = pafs.AwsStandardS3RetryStrategy(max_attempts=REQUEST_ATTEMPTS)
    options = {
        "connect_timeout": CONNECT_TIMEOUT,
        "request_timeout": REQUEST_TIMEOUT,
        "retry_strategy": retry,
    }
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")  # off AWS nobody answers there; a lookup only hangs
        host = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        return pafs.S3FileSystem(
            endpoint_override=host.netloc, scheme=host.scheme, region=region or "us-east-1", **options
        )
    if not region:
        with translated(f"s3://{bucket}"):
            region = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(region=region, **options)


@lru_cache(maxsize=1)
def s3_filesystem() -> Any:
    """s3fs, for the requests that pyarrow lacks: pages of a listing, conditional writes."""
    import s3fs

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return s3fs.S3FileSystem(
        skip_instance_cache=True,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={"connect_timeout": CONNECT_TIMEOUT, "read_timeout": REQUEST_TIMEOUT},
    )


def reconnect() -> None:
    """Forgets all clients: what changed in the environment (keys, endpoint, time-outs) holds from the next call on."""
    _s3.cache_clear()
    opened.cache_clear()
    s3_filesystem.cache_clear()
    _other.cache_clear()


@lru_cache(maxsize=8)
def _other(scheme: str) -> pafs.FileSystem:
    if scheme in ("gs", "gcs"):
        return pafs.GcsFileSystem()
    import fsspec

    try:
        return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))
    except (ValueError, ImportError) as error:
        raise UserError(f"{scheme}://: cannot open this kind of storage ({error})") from error


@contextlib.contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turns the storage errors a user can mend into one line: which URI, what is wrong, what to do."""
    try:
        yield
    except FileNotFoundError as error:
        check = "the path" if is_local(uri) else "the path and, for S3, AWS_ENDPOINT_URL"
        raise UserError(f"{uri}: not found; check {check}") from error
    except PermissionError as error:
        raise UserError(f"{uri}: permission denied") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{uri}: a file is in the way of a folder; move it, or choose another place") from error
    except OSError as error:
        if error.errno in _DISK_HINTS:
            raise UserError(f"{uri}: {_DISK_HINTS[error.errno]}") from error
        for marks, hint in _HINTS:
            if any(mark in str(error) for mark in marks):
                raise UserError(f"{uri}: {hint}") from error
        if is_brief(error):
            raise UserError(f"{uri}: the storage does not answer ({error})") from error
        raise


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it; no part may lead out of it.

    Raises:
        UserError: a part is absolute, holds `..`, a backslash or a NUL byte.
    """
    for part in parts:
        if part.startswith("/") or "\\" in part or "\0" in part or ".." in part.split("/"):
            raise UserError(f"{part!r} leads out of {uri}: paths inside a dataset are relative to its root")
    return "/".join([uri.rstrip("/"), *parts])


def is_local(uri: str) -> bool:
    """Whether `uri` is on this machine's disk."""
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str) -> str:
    """The same place, valid in every working directory (Ray's workers have their own).

    Raises:
        UserError: as `resolve`.
    """
    path = resolve(uri)[1]
    return path if is_local(uri) else uri.rstrip("/")


def exists(uri: str) -> bool:
    """Whether a file is at `uri`.

    Raises:
        UserError: it cannot be known, or the bucket itself is missing.
    """
    filesystem, path = resolve(uri)
    with translated(uri):
        if filesystem.get_file_info(path).type == pafs.FileType.File:
            return True
    if uri.startswith("s3://"):
        bucket = path.split("/")[0]
        with contextlib.suppress(OSError):  # who may not look at the bucket still may at what is in it
            if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
                raise UserError(f"{uri}: the bucket {bucket} does not exist: create it or correct the name")
    return False


def file_size(uri: str) -> int:
    """Bytes of the file at `uri`; 0 if there is none."""
    filesystem, path = resolve(uri)
    with translated(uri):
        return filesystem.get_file_info(path).size or 0


def read_bytes(uri: str) -> bytes:
    """The whole content of the file at `uri`.

    Raises:
        UserError: it does not exist or may not be read.
    """
    filesystem, path = resolve(uri)
    with translated(uri), filesystem.open_input_stream(path) as stream:
        return stream.read()


def read_text(uri: str) -> str:
    """A text file; a byte order mark is passed over, and every kind of line end becomes a plain one.

    Raises:
        UserError: it is not there, or is no UTF-8.
    """
    data = read_bytes(uri)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{uri}: no UTF-8 text (byte 0x{data[error.start]:02x} at {error.start}); save it as UTF-8"
        ) from error
    return "\n".join(text.splitlines())


def read_lines(uri: str) -> list[str]:
    """The lines of a text file without blank ones, without space around them.

    Raises:
        UserError: as `read_text`.
    """
    return [line.strip() for line in read_text(uri).split("\n") if line.strip()]


def read_range(uri: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on of the file at `uri`; fewer if it ends before.

    Raises:
        UserError: it does not exist or may not be read.
    """
    filesystem, path = resolve(uri)
    with translated(uri):
        if uri.startswith("s3://") and len(data := _read_known(uri, offset, size)) == size:
            return data
        with filesystem.open_input_file(path) as file:
            return file.read_at(size, offset) if offset < file.size() else b""


def _read_known(uri: str, offset: int, size: int) -> bytes:
    """As `read_range`; nothing if the object is not what it was when it was opened: it is to be opened anew."""
    try:
        return opened(uri).read_at(size, offset)
    except OSError as error:
        if is_brief(error):
            raise
        return b""


@lru_cache(maxsize=KNOWN_OBJECTS)
def opened(uri: str) -> Any:
    """An object of S3 whose size is known: asking for it would be a request for each range. Threads may share it."""
    filesystem, path = resolve(uri)
    return filesystem.open_input_file(path)


def write_bytes(uri: str, data: bytes) -> None:
    """Writes `data` so that a reader sees all of it or nothing, and creates folders on the way."""
    filesystem, path = resolve(uri)
    with translated(uri):
        if not isinstance(filesystem, pafs.LocalFileSystem):
            with filesystem.open_output_stream(path) as stream:
                stream.write(data)
            return
        filesystem.create_dir(posixpath.dirname(path), recursive=True)
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with filesystem.open_output_stream(temporary) as stream:
                stream.write(data)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def stamp(uri: str) -> str:
    """What changes when the file at `uri` does: its size and time on a disk; nothing is known of other storage."""
    if not is_local(uri):
        return ""
    with contextlib.suppress(OSError):
        found = Path(resolve(uri)[1]).stat()
        return f"{found.st_size}.{found.st_mtime_ns}"
    return ""


def list_files(uri: str) -> list[str]:
    """All files below `uri`, as sorted paths relative to it; empty if nothing is there."""
    return sorted(file_sizes(uri))


def file_sizes(uri: str) -> dict[str, int]:
    """Bytes of all files below `uri`, by their paths relative to it; empty if nothing is there."""
    filesystem, path = resolve(uri)
    if is_local(uri):
        with translated(uri):
            return dict(_walk(path)) if Path(path).is_dir() else {}
    with translated(uri):
        infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    return {posixpath.relpath(info.path, path): info.size for info in infos if info.type == pafs.FileType.File}


def iter_files(uri: str) -> Iterator[tuple[str, int]]:
    """All files below `uri` as relative path and size, in any order; never holds more than a page or a folder of them.

    Raises:
        UserError: nothing is there, or it may not be listed.
    """
    path = resolve(uri)[1]
    with translated(uri):
        if is_local(uri):
            yield from _walk(path)
        elif uri.startswith("s3://"):
            exists(uri)  # says what is wrong with a key, a bucket or an endpoint
            yield from _pages(*path.partition("/")[::2])
        else:
            yield from _folders(_other(uri.partition("://")[0]).handler.fs, path)


def _walk(root: str, below: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, int]]:
    """Links are followed, but not back into a folder on the way to them (`above`, by device and inode)."""
    folder = posixpath.join(root, below)
    known = Path(folder).stat()
    if (known.st_dev, known.st_ino) in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _leads_nowhere(entry):
                yield posixpath.join(below, entry.name), 0  # who reads it is told
            elif entry.is_dir():
                yield from _walk(root, posixpath.join(below, entry.name), (*above, (known.st_dev, known.st_ino)))
            elif entry.is_file():
                yield posixpath.join(below, entry.name), entry.stat().st_size


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Whether it is a link to what is not there, or to itself."""
    if not entry.is_symlink():
        return False
    try:
        entry.stat()
    except OSError:
        return True
    return False


def _folders(filesystem: Any, path: str) -> Iterator[tuple[str, int]]:
    """Folder by folder, through fsspec; the first one is `path` itself, in the spelling of the others."""
    root = None
    for folder, _, files in filesystem.walk(path, detail=True):
        root = folder if root is None else root
        below = posixpath.relpath(folder, root)
        yield from ((posixpath.normpath(posixpath.join(below, name)), files[name]["size"]) for name in files)


def _pages(bucket: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Pages of up to 1000 keys; pyarrow would hold them all."""
    below, token = f"{prefix}/" if prefix else "", {}
    while True:
        page: Any = s3_filesystem().call_s3("list_objects_v2", Bucket=bucket, Prefix=below, **token)
        for entry in page.get("Contents", ()):
            if not entry["Key"].endswith("/"):  # what some tools leave for an empty folder
                yield entry["Key"][len(below) :], entry["Size"]
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def delete(uri: str) -> None:
    """Removes the file or the folder at `uri`; nothing happens if there is none."""
    filesystem, path = resolve(uri)
    with translated(uri):
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(path)


def delete_empty(uri: str) -> None:
    """Removes the folder at `uri` if nothing is in it."""
    path = resolve(uri)[1]
    if is_local(uri):
        with contextlib.suppress(OSError):  # other than empty, or not there
            Path(path).rmdir()
    elif not file_sizes(uri):
        delete(uri)  # the mark of a folder, which some stores keep


def check_writable(uri: str) -> None:
    """Writes and removes a probe below `uri`, so that a long job fails now and not at its first checkpoint.

    A first write would not do: some storages take a name and then neither find nor delete it, and some users may
    write but not delete.

    Raises:
        UserError: wrong key, bucket or endpoint, no permission, or a name that the storage cannot hold.
    """
    probe = join(uri, f".probe-{uuid.uuid4().hex[:8]}")
    write_bytes(probe, b"")
    delete(probe)
