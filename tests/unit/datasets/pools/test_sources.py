"""Images, tar files and Parquet files as other tools write them: what is an image, what is none, what is damaged."""

import io
import os
import random
import re
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.datasets.pools.make import make_pool
from pipeline.datasets.pools.sources import POOL_SOURCES, read_images
from pipeline.datasets.raw.flags import parse
from pipeline.errors import UserError
from tests.unit.datasets.pools.reading import expected, photo, rows, write_tar

JUNK = ["._0.jpg", ".Trash/old.jpg", "__MACOSX/1.jpg", "a/@eaDir/0.jpg/thumb.jpg", ".hidden.jpg"]


# ---- images -------------------------------------------------------------------------------------------------------


def test_junk_is_no_image(few, trees, tmp_path):
    good = expected(few)
    for name in JUNK:
        trees.put(few / name, b"no picture")
    assert rows(make_pool("images", str(few), str(tmp_path / "pool"), copy=True)) == good


def test_names_that_cannot_be_used(few, tmp_path, capsys):
    for name in (b"caf\xe9.jpg", b"two\nlines.jpg"):
        (few / os.fsdecode(name)).write_bytes(b"any")
    pool = make_pool("images", str(few), str(tmp_path / "pool"))
    assert len(rows(pool)) == 20
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert "left out 2 files" in line
    assert r"caf\xe9.jpg" in line or r"two\nlines.jpg" in line
    for name in expected(few, "0.jpg"):
        (few / name).unlink()


def test_pictures_that_are_not_read_are_told(few, trees, tmp_path, capsys):
    for name in ("a.HEIC", "b.heic", "c.gif", ".d.gif", "e.txt"):
        trees.put(few / name, "any")
    make_pool("images", str(few), str(tmp_path / "pool"))
    assert "passed over pictures of kinds that are not read: 1 .gif, 2 .heic\n" in capsys.readouterr().err
    for file in few.glob("*.jpg"):
        file.unlink()
    with pytest.raises(
        UserError, match=r"few: no \.jpg.* files below it \(1 \.gif, 2 \.heic are kinds that are not read\)"
    ):
        make_pool("images", str(few), str(tmp_path / "other"))


@pytest.mark.parametrize("source", ["images", "tar"])
@pytest.mark.parametrize("suffix", ["webp", "BMP", "tif", "tiff", "PNG"])
def test_formats(trees, tmp_path, source, suffix):
    """Links are not looked into, so this holds whatever training can decode."""
    form = "TIFF" if suffix == "tif" else suffix.upper()
    files = {f"{number}.{suffix}": photo(trees, number, form) for number in range(3)}
    for name, data in files.items():
        trees.put(tmp_path / "images" / name, data)
    write_tar(tmp_path / "tar/a.tar", files)
    found = rows(make_pool(source, str(tmp_path / source), str(tmp_path / "pool")))
    assert {name.removeprefix("a.tar/"): data for name, data in found.items()} == files


# ---- tar ----------------------------------------------------------------------------------------------------------


def test_junk_in_tar_files(trees, tmp_path):
    image = photo(trees, 0)
    names = ["0.jpg", "./1.jpg", "../2.jpg", "/3.jpg", "./a/./4.jpg"]
    write_tar(tmp_path / "tars/a.tar", dict.fromkeys(names + JUNK, image) | {f"./{name}": image for name in JUNK})
    write_tar(tmp_path / "tars/._a.tar", {"x.jpg": image})
    pool = make_pool("tar", str(tmp_path / "tars"), str(tmp_path / "pool"))
    assert rows(pool) == {f"a.tar/{name}": image for name in names}


@pytest.mark.parametrize("copy", [False, True])
def test_names_in_tar_files_that_are_no_text(trees, tmp_path, copy):
    members = {os.fsdecode(name): photo(trees, n) for n, name in enumerate([b"caf\xe9.jpg", b"a\nb.jpg", b"plain.jpg"])}
    write_tar(tmp_path / "tars/a.tar", members, format=tarfile.GNU_FORMAT)
    pool = make_pool("tar", str(tmp_path / "tars"), str(tmp_path / "pool"), copy=copy)
    ids = [r"a.tar/caf\xe9.jpg", r"a.tar/a\nb.jpg", "a.tar/plain.jpg"]
    assert rows(pool) == dict(zip(ids, members.values(), strict=True))


def test_masks_beside_images_in_tar_files(trees, tmp_path, capsys):
    image = photo(trees, 1)
    images = [
        "0000.jpg",
        "a/0001.JPG",
        "IMG.2024.06.01.jpg",
        "IMG.2024.06.02.jpg",
        "a/0000.x.png",
        "0002.jpg",
        "0002.png",
    ]
    about = ["0000.seg.png", "a/0001.depth.tiff", "0002.seg.png"]
    for number in range(7):  # in two batches of files
        write_tar(tmp_path / f"tars/{number}.tar", dict.fromkeys(sorted(images + about), image))
    pool = make_pool("tar", str(tmp_path / "tars"), str(tmp_path / "pool"))
    assert sorted(rows(pool)) == sorted(f"{number}.tar/{name}" for number in range(7) for name in images)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert line.startswith("left out 21 members of tar files that are about another image of their name, such as ")
    assert line.endswith(".tar/0000.seg.png")


def test_tar_files_that_were_mended(trees, tmp_path):
    """The same command goes on with them, although its listing was of other files."""
    members = {f"{number}.jpg": photo(trees, number) for number in range(9)}
    write_tar(tmp_path / "whole.tar", members)
    whole = (tmp_path / "whole.tar").read_bytes()
    for name, spoil, message in (
        ("cut", lambda: trees.put(tmp_path / "cut/a.tar", whole[:3000]), "not a whole uncompressed tar file"),
        ("bare", lambda: write_tar(tmp_path / "bare/a.tar", {"a.txt": b"text"}), "hold no images"),
    ):
        spoil()
        with pytest.raises(UserError, match=message):
            make_pool("tar", str(tmp_path / name), str(tmp_path / f"{name}-pool"))
        trees.put(tmp_path / name / "a.tar", whole)
        pool = make_pool("tar", str(tmp_path / name), str(tmp_path / f"{name}-pool"))
        assert rows(pool) == {f"a.tar/{key}": data for key, data in members.items()}


def test_a_bad_image_in_a_tar_file(trees, tmp_path):
    write_tar(tmp_path / "tars/a.tar", {"0.jpg": b"no picture", "1.jpg": photo(trees, 1)})
    arguments = ("tar", str(tmp_path / "tars"), str(tmp_path / "pool"))
    what = (
        r"a\.tar/0\.jpg: unreadable image .*; fix them \(after that, delete (\S+) and (\S+) and begin again\) or pass"
    )
    with pytest.raises(UserError, match=what) as caught:
        make_pool(*arguments, copy=True)
    match = re.search(what, str(caught.value))
    assert match
    write_tar(
        tmp_path / "tars/a.tar", {"longer.jpg": photo(trees, 5), "0.jpg": photo(trees, 0), "1.jpg": photo(trees, 1)}
    )
    for folder in match.groups():
        shutil.rmtree(folder)
    assert len(rows(make_pool(*arguments, copy=True))) == 3


def test_a_tar_file_that_would_be_read_for_ever(trees, tmp_path):
    """A negative size leads back to where the member begins."""
    info = tarfile.TarInfo("0.jpg")
    info.size = -1024
    header = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/a.tar").write_bytes(header + bytes(1024))
    with pytest.raises(UserError, match=r"a\.tar: not a whole uncompressed tar file"):
        make_pool("tar", str(tmp_path / "tars"), str(tmp_path / "pool"))


# ---- Parquet ------------------------------------------------------------------------------------------------------


def _images(trees, count=10) -> list[bytes]:
    return [photo(trees, number) for number in range(count)]


@pytest.mark.parametrize(
    "column",
    [
        lambda images: pa.array(images, pa.binary()).dictionary_encode(),
        lambda images: pa.array(images, pa.large_binary()).dictionary_encode(),
        lambda images: pa.array(images, pa.binary_view()),
        lambda images: pa.array(images, pa.large_binary()),
        lambda images: pa.array([None if each is None else {"bytes": each, "path": "p"} for each in images]),
        lambda images: pa.array([{"bytes": each, "path": "p"} for each in images]),
    ],
)
def test_columns_of_any_kind_of_bytes(trees, tmp_path, column):
    images = [*_images(trees), None]
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"picture": column(images), "n": range(11)}), tmp_path / "raw/a.parquet", row_group_size=4)
    with pytest.raises(UserError, match=r"a\.parquet#2\.2: unreadable image"):
        make_pool("parquet", str(tmp_path / "raw"), str(tmp_path / "pool"))
    pool = make_pool("parquet", str(tmp_path / "raw"), str(tmp_path / "pool"), skip_bad=True)
    assert rows(pool) == {f"a.parquet#{n // 4}.{n % 4}": image or b"" for n, image in enumerate(images)}
    assert (pool.images(1), pool.info.generations[0].blank) == (10, 1)


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("bytes_", [None, b""])
def test_files_of_paths_alone(trees, tmp_path, skip_bad, bytes_):
    """A good file beside it does not help: the bad one was exported wrongly."""
    (tmp_path / "raw").mkdir()
    whole = pa.array([{"bytes": each, "path": "p"} for each in _images(trees)])
    paths = pa.array([{"bytes": bytes_, "path": f"{n}.jpg"} for n in range(6)], whole.type)
    pq.write_table(pa.table({"image": whole}), tmp_path / "raw/a.parquet")
    pq.write_table(pa.table({"image": paths}), tmp_path / "raw/b.parquet", row_group_size=4)
    with pytest.raises(UserError, match=r"raw/b\.parquet: no image in column `image` has bytes: .* paths or nothing"):
        make_pool("parquet", str(tmp_path / "raw"), str(tmp_path / "pool"), skip_bad=skip_bad)


def test_a_row_group_without_bytes_is_not_a_file_without(trees, tmp_path):
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"image": [None] * 4 + _images(trees)}), tmp_path / "raw/a.parquet", row_group_size=4)
    pool = make_pool("parquet", str(tmp_path / "raw"), str(tmp_path / "pool"), skip_bad=True)
    assert sorted(rows(pool).values()) == sorted([b""] * 4 + _images(trees))


def test_several_columns_of_bytes(trees, tmp_path):
    (tmp_path / "raw").mkdir()
    images, small = _images(trees), [photo(trees, 100 + number) for number in range(10)]
    table = pa.table({"jpg": images, "thumb": [{"bytes": each} for each in small], "caption": ["a"] * 10})
    pq.write_table(table, tmp_path / "raw/a.parquet")
    raw, out = str(tmp_path / "raw"), str(tmp_path / "pool")
    with pytest.raises(UserError, match=r"a\.parquet: several columns of bytes, \['jpg', 'thumb'\]; .*--column NAME"):
        make_pool("parquet", raw, out)
    with pytest.raises(UserError, match=r"no column `caption` of bytes.* \['jpg', 'thumb', 'caption'\]"):
        make_pool("parquet", raw, out, column="caption")
    assert sorted(rows(make_pool("parquet", raw, out, column="thumb")).values()) == sorted(small)
    pq.write_table(table, tmp_path / "raw/b.parquet")
    with pytest.raises(UserError, match=r"was made with --source parquet --root \S+/raw --column thumb"):
        make_pool("parquet", raw, out, column="jpg", append=True)
    pool = make_pool("parquet", raw, out, column="thumb", append=True)
    assert sorted(rows(pool).values()) == sorted(2 * small)
    assert sorted(rows(make_pool("parquet", raw, out, column="jpg", overwrite=True)).values()) == sorted(2 * images)


def test_the_flag_for_the_column():
    flags = ["--source", "parquet", "--root", "raw", "--out", "pool"]
    assert parse(flags, None).column == ""
    assert parse([*flags, "--column", "jpg"], None).column == "jpg"
    with pytest.raises(UserError, match="--column names the images of Parquet files"):
        parse(["--source", "images", *flags[2:], "--column", "jpg"], None)


def test_a_file_that_was_changed_meanwhile(trees, tmp_path, monkeypatch):
    from pipeline.datasets.pools import make

    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"image": _images(trees)}), tmp_path / "raw/a.parquet")
    write = make._write_parts

    def changing(*arguments):
        pq.write_table(pa.table({"image": _images(trees, 7)}), tmp_path / "raw/a.parquet")
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(make, "_write_parts", changing)
        with pytest.raises(
            UserError, match=r"raw/a\.parquet: has changed since it was listed; delete \S+gen-00000 and"
        ):
            make_pool("parquet", str(tmp_path / "raw"), str(tmp_path / "pool"))


# ---- damage -------------------------------------------------------------------------------------------------------


def _whole_files(images: list[bytes]) -> list[tuple[str, bytes]]:
    """Source and content of small files of each kind."""
    found = []
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for number, image in enumerate(images):
                info = tarfile.TarInfo(f"{'x' * 120 * (number == 3)}é{number}.jpg")
                info.size = len(image)
                archive.addfile(info, io.BytesIO(image))
        found.append(("tar", buffer.getvalue()))
    structs = pa.array([{"bytes": each, "path": "p"} for each in images])
    for column in (pa.array(images), structs, pa.array(images).dictionary_encode(), pa.array(images, pa.binary_view())):
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": column}), buffer, row_group_size=4)
        found.append(("parquet", buffer.getvalue()))
    return found


def _spoiled(rng: random.Random, source: str, data: bytes) -> bytes:
    """A file with some bytes changed, added or gone; more often where a format keeps its own bookkeeping."""
    spoiled = bytearray(data)
    footer = len(data) - int.from_bytes(data[-8:-4], "little") - 8
    first = footer if source == "parquet" and rng.random() < 0.6 else 0
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        place, kind = rng.randrange(min(first, len(spoiled) - 1), len(spoiled)), rng.random()
        if kind < 0.7:
            spoiled[place] = rng.randrange(256)
        elif kind < 0.8:
            spoiled[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif kind < 0.9:
            del spoiled[place : place + rng.randrange(1, 9)]
        else:
            spoiled[place : place + 4] = b"\xff" * 4
    if rng.random() < 0.1:
        del spoiled[rng.randrange(len(spoiled)) :]
    if source == "tar" and rng.random() < 0.7:
        for start in range(0, len(spoiled) - 511, 512):  # else nearly all that is seen are wrong checksums
            block = spoiled[start : start + 512]
            if block[257:262] == b"ustar":
                spoiled[start + 148 : start + 156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return bytes(spoiled)


@pytest.mark.parametrize("kind", range(6))
def test_damaged_files_are_told_in_one_line(trees, tmp_path, kind, rounds):
    rng, told = random.Random(kind), []
    source, data = _whole_files(_images(trees, 6))[kind]
    file = Path(tmp_path / f"a.{source}")
    for _ in rounds:
        spoiled = _spoiled(rng, source, data)
        file.write_bytes(spoiled)
        try:
            keys = list(POOL_SOURCES[source].keys(str(tmp_path), file.name, len(spoiled)))
            for name, _, offset, size, _ in keys:
                name.encode()
                if source == "parquet":
                    read_images(str(tmp_path), file.name, offset)
                else:
                    assert 0 <= offset <= offset + size <= len(spoiled)
        except UserError as error:
            told.append(str(error))
    assert len(told) > 10
    assert all(text.startswith(f"{file}: ") and text.isprintable() for text in told)
