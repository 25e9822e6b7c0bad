"""Files as people have them: which names are data, and which cannot be used."""

import posixpath
import unicodedata
from collections.abc import Mapping
from pathlib import PurePosixPath

from pipeline.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Names of images end so, in either case."""
MASK_SUFFIXES = (".png", ".tif", ".tiff")
PICTURE_SUFFIXES = (
    *IMAGE_SUFFIXES, ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".jfif", ".jpe",
    ".ppm", ".pgm", ".tga", ".psd",
)  # fmt: skip
"""Names of pictures end so, also of kinds that are not read: such files are told, not passed over."""
_JUNK = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information", "thumbs.db",
    "desktop.ini",
}  # fmt: skip
"""What systems and disks leave beside data, in lower case; names that begin with a dot are theirs as well."""


def is_junk(path: str) -> bool:
    """Whether a file is no data: some part of its path is hidden, or is a name out of what systems leave behind."""
    return any(part.startswith(".") or part.lower() in _JUNK for part in path.split("/"))


def has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a name ends in one of `suffixes`, in either case."""
    return path.lower().endswith(suffixes)


def without_suffix(path: str) -> str:
    """A path without the suffix of an image or mask; any other dot is part of the name: IMG.2024.06.01 stays."""
    known = (*PICTURE_SUFFIXES, ".mat")
    return path[: -len(PurePosixPath(path).suffix)] if has_suffix(path, known) else path


def is_usable(path: str) -> bool:
    """Whether a path below a root can be named in a URI, a list and a message.

    It cannot with control characters (line ends), bytes that are no UTF-8, or what a URI gives another meaning.
    """
    plain = all(map(_is_plain, path)) and not set(path) & set("?\\")
    plain = plain and without_suffix(path) == without_suffix(path).strip()  # lists are read without space around
    return plain and posixpath.normpath(path) == path and not path.startswith(("/", ".."))


def _is_plain(char: str) -> bool:
    """Neither a control character, nor a line end, nor a byte that is no UTF-8."""
    return unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp")


def escaped(name: str) -> str:
    r"""A name in which everything that cannot be printed stands as an escape: `caf\xe9.jpg`."""
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if _is_plain(char) else char.encode("unicode_escape").decode() for char in shown)


def counts_of(passed: Mapping[str, int]) -> str:
    """Counts of what was passed over, for people: `1 .heic, 3 .svg`."""
    return ", ".join(f"{count} {what}" for what, count in sorted(passed.items()))


def check_name(folder: str, path: str) -> None:
    """Refuses a file whose name cannot be used.

    Raises:
        UserError: see `is_usable`.
    """
    if not is_usable(path):
        raise UserError(
            f"{folder}/{escaped(path)}: lists and URIs cannot hold this name "
            "(line ends, spaces around, ? or \\, no UTF-8); rename it"
        )
