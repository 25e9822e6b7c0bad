"""A small file that several processes change, each only if it is still as that process knows it.

S3 has conditional writes for it (`If-None-Match`, `If-Match`). On a disk each version is a file of its own, whose name
can be created only once; that holds on NFS, too, where locks often do not. Storage that fsspec opens has neither: there
a change is read back, which tells of another writer, but not of one within the same instant.
"""

import contextlib
import errno
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.errors import UserError

WRITING_SECONDS = 1.0
"""How long a version without content may be one that somebody is just writing; after that its writer has died."""


class Version(NamedTuple):
    """What a file held when it was read."""

    data: bytes
    tag: str
    """Tells this version from every other one of the file; empty: there is none yet."""


NOTHING = Version(b"", "")
"""Of a file that is not there."""


def read(uri: str) -> Version:
    """The newest version, or `NOTHING`.

    Raises:
        UserError: it may not be read, or the bucket is missing.
    """
    with storage.translated(uri):
        if storage.is_local(uri):
            return _read_local(Path(storage.resolve(uri)[1]))
        if uri.startswith("s3://"):
            return _read_s3(uri)
    if not storage.exists(uri):
        return NOTHING
    data = storage.read_bytes(uri)
    return Version(data, hashlib.sha256(data).hexdigest())


def write(uri: str, data: bytes, known: Version) -> bool:
    """Makes `data` the newest version if `known` still is; of several processes that try, one does.

    Args:
        uri: where; on a disk this becomes a folder with one file.
        data: unlike any earlier version.
        known: what `read` gave.

    Returns:
        Whether it was written; False: another process was first.

    Raises:
        UserError: it may not be written, or the storage knows no conditional writes.
    """
    with storage.translated(uri):
        if storage.is_local(uri):
            return _write_local(Path(storage.resolve(uri)[1]), data, known)
        if uri.startswith("s3://"):
            return _write_s3(uri, data, known)
    if read(uri).tag != known.tag:
        return False
    storage.write_bytes(uri, data)
    return storage.read_bytes(uri) == data


# ---- a disk -----------------------------------------------------------------------------------------------------


def _read_local(folder: Path) -> Version:
    since = time.monotonic()
    while True:
        numbers = _numbers(folder)
        if not numbers:
            return NOTHING
        with contextlib.suppress(FileNotFoundError):  # a newer one has taken its place meanwhile
            data = _file(folder, max(numbers)).read_bytes()
            if data or time.monotonic() - since > WRITING_SECONDS:
                return Version(data, str(max(numbers)))
            time.sleep(0.01)


def _write_local(folder: Path, data: bytes, known: Version) -> bool:
    number = int(known.tag or 0) + 1
    folder.mkdir(parents=True, exist_ok=True)
    own = _file(folder, number)
    try:
        with own.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    numbers = _numbers(folder)
    if max(numbers) > number:  # `known` was so old that its successor is gone already, and its name free again
        own.unlink(missing_ok=True)
        return False
    for older in numbers:
        if older < number:
            _file(folder, older).unlink(missing_ok=True)
    return True


def _numbers(folder: Path) -> list[int]:
    return [int(file.name) for file in folder.iterdir() if file.name.isdigit()] if folder.is_dir() else []


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}"


# ---- S3 ---------------------------------------------------------------------------------------------------------


def _read_s3(uri: str) -> Version:
    from fsspec.asyn import sync

    def get(filesystem: Any, **place: str) -> Version:
        found = filesystem.call_s3("get_object", **place)
        data: Any = sync(filesystem.loop, found["Body"].read)
        return Version(data, found["ETag"])

    try:
        return _call(uri, get)
    except FileNotFoundError:
        return NOTHING


def _write_s3(uri: str, data: bytes, known: Version) -> bool:
    condition = {"IfMatch": known.tag} if known.tag else {"IfNoneMatch": "*"}
    try:
        _call(uri, lambda filesystem, **place: filesystem.call_s3("put_object", Body=data, **condition, **place))
    except _Conflict:
        return _read_s3(uri).data == data  # an answer that was lost is asked for again, and then meets itself
    return True


class _Conflict(Exception):
    """The condition of a write does not hold."""


_CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_TEXTS = {
    "NoSuchBucket": "NO_SUCH_BUCKET",
    "SlowDown": "SLOW_DOWN",
    "503": "SLOW_DOWN",
    "ServiceUnavailable": "SERVICE_UNAVAILABLE",
    "InternalError": "INTERNAL_FAILURE",
    "500": "INTERNAL_FAILURE",
    "RequestTimeTooSkewed": "REQUEST_TIME_TOO_SKEWED",
}
"""pyarrow's words for what S3 says, by which `storage` knows it."""


def _call(uri: str, request: Callable[..., Any]) -> Any:
    """One request, with errors as `storage.translated` knows them; a missing key is a FileNotFoundError."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = storage.resolve(uri)[1].partition("/")
    try:
        return request(storage.s3_filesystem(), Bucket=bucket, Key=key)
    except BotoCoreError as error:  # nobody answers
        raise ConnectionError(str(error)) from error
    except OSError as error:
        cause = error.__cause__
        code = cause.response.get("Error", {}).get("Code", "") if isinstance(cause, ClientError) else ""
        if code in _CONFLICTS:
            raise _Conflict from error
        if code in ("NotImplemented", "501"):
            raise UserError(
                f"{uri}: the storage has no conditional writes (If-None-Match), which a run needs"
            ) from error
        if code in _TEXTS:
            raise OSError(errno.EIO, _TEXTS[code]) from error
        if isinstance(error, PermissionError):
            raise OSError(errno.EIO, "ACCESS_DENIED") from error
        raise
