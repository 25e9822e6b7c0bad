"""Names and texts as systems and other tools leave them."""

import pytest

from pipeline import storage
from pipeline.datasets import files
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("path", "junk"),
    [
        ("a/b.jpg", False), ("a.b/c.d.jpg", False), (".ipynb_checkpoints/a-checkpoint.jpg", True),
        ("a/@eaDir/b.jpg", True), ("a/._b.jpg", True), ("__MACOSX/a.jpg", True), (".Trash/a.jpg", True),
        ("x/Thumbs.db", True), ("$RECYCLE.BIN/a.png", True),
    ],
)  # fmt: skip
def test_junk(path, junk):
    assert files.is_junk(path) == junk


def test_only_suffixes_of_pictures_are_cut():
    names = ["IMG.2024.06.01", "a/IMG.2024.06.01.JPG", "scan.v2", "a.tiff", "a.mat", "b c.png"]
    assert [files.without_suffix(name) for name in names] == [
        "IMG.2024.06.01", "a/IMG.2024.06.01", "scan.v2", "a", "a", "b c",
    ]  # fmt: skip


def test_names_that_lists_cannot_hold_are_refused_and_can_be_shown():
    for name in ("a/ü b.jpg", "Screenshot at 3.14\u202fPM.png", "100 %#.jpg"):
        files.check_name("root", name)
    for name, shown in (
        ("new\nline.jpg", r"new\\nline.jpg"),
        ("caf\udce9.jpg", r"caf\\xe9.jpg"),
        ("a?.jpg", r"a\?.jpg"),
        ("a/b .jpg", "a/b .jpg"),
    ):
        with pytest.raises(UserError, match=f"root/{shown}: lists and URIs cannot hold this name .*; rename it"):
            files.check_name("root", name)


def test_texts_of_any_editor(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffbg\r\n\r\n disk \rbox".encode())
    assert storage.read_lines(str(path)) == ["bg", "disk", "box"]
    path.write_bytes("straße".encode("cp1252"))
    with pytest.raises(UserError, match=r"list\.txt: no UTF-8 text \(byte 0xdf at 4\); save it as UTF-8"):
        storage.read_text(str(path))


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "set/a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set/a/1.jpg").touch()
    (tmp_path / "elsewhere/2.jpg").touch()
    (tmp_path / "set/a/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/lost.jpg").symlink_to(tmp_path / "moved away")
    (tmp_path / "set/self").symlink_to(tmp_path / "set/self")
    root = str(tmp_path / "set")
    assert storage.list_files(root) == ["a/1.jpg", "far/2.jpg", "lost.jpg", "self"]
    assert sorted(name for name, _ in storage.iter_files(root)) == ["a/1.jpg", "far/2.jpg", "lost.jpg", "self"]
    with pytest.raises(UserError, match=r"lost\.jpg: not found"):  # not passed over: its mask would be lost, too
        storage.read_bytes(f"{root}/lost.jpg")
