"""What each layout yields, and what is said about broken trees."""

import re

import pytest

from pipeline.datasets.prepared.prepare import check_samples
from pipeline.datasets.raw.flags import parse, read_raw
from pipeline.datasets.raw.layouts import (
    Folders,
    RawSample,
    read_ade20k,
    read_camvid,
    read_cityscapes,
    read_folder,
    read_tree,
    read_voc,
)
from pipeline.datasets.specs import KNOWN, find_spec, voc_palette, with_values
from pipeline.errors import UserError


def test_voc_lists_decide_and_the_rest_is_unlabeled(trees, tmp_path):
    samples = {each.id: each for each in read_voc(Folders(str(trees.voc(tmp_path, train=3, extra=2, masked=2))))}
    assert sorted(samples) == ["a0", "a1", "a2", "e0", "e1", "v0", "v1"]
    assert [key for key, each in samples.items() if each.mask_uri is None] == ["a2", "e0", "e1"]
    assert {key for key, each in samples.items() if each.subset == "val"} == {"v0", "v1"}


def test_voc_test_images_are_left_out(trees, tmp_path):
    root = trees.voc(tmp_path, extra=2)
    trees.put(root / "ImageSets/Segmentation/test.txt", "e0\n")
    assert {each.id for each in read_voc(Folders(str(root)))} >= {"e1"}
    assert "e0" not in {each.id for each in read_voc(Folders(str(root)))}


def test_voc_augmented_masks_win_if_their_list_is_there(trees, tmp_path):
    root = trees.voc(tmp_path, train=2, extra=1)
    for name in ("a0", "a1", "e0", "v0", "v1"):
        trees.put(root / f"SegmentationClassAug/{name}.png", trees.mask())
    assert all("SegmentationClass/" in each.mask_uri for each in read_voc(Folders(str(root))) if each.mask_uri)
    trees.put(root / "ImageSets/Segmentation/trainaug.txt", "a0\na1\ne0\n")
    samples = read_voc(Folders(str(root)))
    assert all("SegmentationClassAug/" in str(each.mask_uri) for each in samples)
    classic = read_voc(Folders(str(root)), masks="SegmentationClass", train_list="trainaug")
    assert [each.id for each in classic if each.mask_uri is None] == ["e0"]


def test_voc_with_sbd_is_the_augmented_set(trees, tmp_path):
    root = trees.voc(tmp_path / "voc", train=2, val=2, extra=3)
    sbd = trees.sbd(tmp_path / "sbd", train="a0 e0 v1", val="e1 only")
    (tmp_path / "sbd/cls/in_no_list.mat").write_bytes(b"x")
    samples = {each.id: each for each in read_voc(Folders(str(root)), sbd=str(sbd))}
    check_samples(list(samples.values()))
    masked = {key: str(each.mask_uri) for key, each in samples.items() if each.subset == "train" and each.mask_uri}
    assert sorted(masked) == ["a0", "a1", "e0", "e1", "only"], "both train sides and SBD's val, without VOC's val"
    assert {key for key, uri in masked.items() if uri.endswith(".mat")} == {"e0", "e1", "only"}, "VOC's masks win"
    assert samples["e0"].image_uri == f"{root}/JPEGImages/e0.jpg"
    assert samples["only"].image_uri == f"{sbd}/img/only.jpg"
    assert (samples["e2"].subset, samples["e2"].mask_uri) == ("train", None)
    assert {each.mask_uri for each in samples.values() if each.subset == "val"} == {
        f"{root}/SegmentationClass/{name}.png" for name in ("v0", "v1")
    }


def test_augmented_masks_of_others_do_not_mix_with_sbd(trees, tmp_path):
    root = trees.voc(tmp_path / "voc", train=1, val=1)
    trees.put(root / "SegmentationClassAug/a0.png", trees.mask())
    trees.put(root / "ImageSets/Segmentation/trainaug.txt", "a0\n")
    released = tmp_path / "benchmark_RELEASE/dataset"
    trees.sbd(released, train="e0", val="e1")
    samples = read_voc(Folders(str(root)), sbd=str(tmp_path))
    folders = [str(each.mask_uri).split("/")[-2] for each in samples]
    assert folders == ["SegmentationClass", "cls", "cls", "SegmentationClass"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [("cls/e0.mat", "train.txt: names e0, but cls"), ("img/e1.jpg", "names e1, but img"), ("val.txt", "not found")],
)
def test_broken_sbd_trees_are_named(trees, tmp_path, spoil, words):
    root = trees.voc(tmp_path / "voc")
    sbd = trees.sbd(tmp_path / "sbd", train="e0 e2", val="e1 e3")
    (sbd / spoil).unlink()
    with pytest.raises(UserError, match=words):
        read_voc(Folders(str(root)), sbd=str(sbd))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("SegmentationClass/v1.png", "v1: a validation image without a mask"),
        ("JPEGImages/a1.jpg", "names a1"),
        (
            "ImageSets/Segmentation/train.txt",
            "train.txt: no such list; --train_list takes one of .*: val",
        ),
    ],
)
def test_voc_missing_files_are_named(trees, tmp_path, spoil, words):
    root = trees.voc(tmp_path)
    (root / spoil).unlink()
    with pytest.raises(UserError, match=words):
        read_voc(Folders(str(root)))


def test_wrong_root_is_named(tmp_path):
    with pytest.raises(UserError, match="JPEGImages: no such folder; check --root"):
        read_voc(Folders(str(tmp_path)))
    with pytest.raises(UserError, match="needs --root"):
        read_tree("voc", None, {})
    with pytest.raises(UserError, match="--masks belongs to --source voc"):
        read_tree("folder", str(tmp_path), {"masks": "x"})


def test_cityscapes(trees, tmp_path):
    for subset, city, frame in (("train", "ulm", 1), ("train", "ulm", 2), ("val", "bonn", 3), ("test", "rom", 4)):
        trees.put(tmp_path / f"leftImg8bit/{subset}/{city}/{city}_{frame}_leftImg8bit.png", trees.image())
        trees.put(tmp_path / f"gtFine/{subset}/{city}/{city}_{frame}_gtFine_labelIds.png", b"x")
    trees.put(tmp_path / "leftImg8bit/train_extra/ulm/ulm_9_leftImg8bit.png", trees.image())
    trees.put(tmp_path / "gtFine/train/ulm/ulm_2_gtFine_labelTrainIds.png", b"x")
    trees.put(tmp_path / "gtFine/train/ulm/ulm_2_gtFine_color.png", b"x")
    samples = {each.id: each for each in read_cityscapes(Folders(str(tmp_path)))}
    assert {key: (each.subset, each.label_ids) for key, each in samples.items()} == {
        "ulm_1": ("train", True),
        "ulm_2": ("train", False),
        "ulm_9": ("train", False),
        "bonn_3": ("val", True),
    }
    assert samples["ulm_9"].mask_uri is None
    assert str(samples["ulm_2"].mask_uri).endswith("labelTrainIds.png")
    (tmp_path / "gtFine/val/bonn/bonn_3_gtFine_labelIds.png").unlink()
    with pytest.raises(UserError, match="without a mask in gtFine"):
        read_cityscapes(Folders(str(tmp_path)))


def test_folder(trees, tmp_path):
    for name in ("train/x/1.jpg", "train/2.png", "val/1.jpg"):
        trees.put(tmp_path / "images" / name, trees.image())
    for name in ("train/x/1.png", "val/1.png"):
        trees.put(tmp_path / "masks" / name, trees.mask())
    samples = {each.id: (each.subset, each.mask_uri is not None) for each in read_folder(Folders(str(tmp_path)))}
    assert samples == {"train/x/1": ("train", True), "train/2": ("train", False), "val/1": ("val", True)}


def test_folder_of_images_alone_is_a_pool(trees, tmp_path):
    trees.put(tmp_path / "images/train/1.jpg", trees.image())
    samples = read_folder(Folders(str(tmp_path)))
    check_samples(samples)
    assert samples[0].mask_uri is None


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("images/1.jpg", "expected images/train"),
        ("images/val/1.jpg", "validation image without a mask"),
        ("images/train/a.jpg", "duplicate id train/a"),
        ("masks/train/lost.png", "a mask without an image"),
    ],
)
def test_folder_mistakes_are_named(trees, tmp_path, file, words):
    trees.put(tmp_path / "images/train/a.png", trees.image())
    trees.put(tmp_path / file, trees.image())
    with pytest.raises(UserError, match=words):
        read_folder(Folders(str(tmp_path)))


def test_camvid_as_segnet_ships_it(trees, tmp_path):
    for name in ("train/a.png", "train/b.png", "trainannot/a.png", "val/c.png", "valannot/c.png", "test/d.png"):
        trees.put(tmp_path / name, trees.image("PNG"))
    samples = {each.id: (each.subset, each.mask_uri is not None) for each in read_camvid(Folders(str(tmp_path)))}
    assert samples == {"a": ("train", True), "b": ("train", False), "c": ("val", True)}
    assert all(each.label_ids for each in read_camvid(Folders(str(tmp_path))))
    (tmp_path / "valannot/c.png").unlink()
    with pytest.raises(UserError, match="c: a validation image without a mask in valannot"):
        read_camvid(Folders(str(tmp_path)))


def test_ade20k(trees, tmp_path):
    for subset, name in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        trees.put(tmp_path / f"images/{subset}/{name}.jpg", trees.image())
        trees.put(tmp_path / f"annotations/{subset}/{name}.png", trees.mask())
    samples = read_tree("ade20k", str(tmp_path), {})[0]
    assert [(each.id, each.subset, each.label_ids) for each in samples] == [
        ("ADE_train_1", "train", True),
        ("ADE_val_1", "val", True),
    ]
    trees.put(tmp_path / "annotations/training/lost.png", trees.mask())
    with pytest.raises(UserError, match=r"lost.png: a mask without an image of the same name in images/training"):
        read_ade20k(Folders(str(tmp_path)))


def test_check_samples():
    one = RawSample("a", "train", "x/a.jpg", "m/a.png")
    with pytest.raises(UserError, match=r"duplicate id a: x/a.jpg and y/a.jpg"):
        check_samples([one, RawSample("a", "train", "y/a.jpg", None)])
    with pytest.raises(UserError, match="no train images"):
        check_samples([RawSample("v", "val", "v.jpg", "v.png")])
    with pytest.raises(UserError, match="no validation images"):
        check_samples([one])


def test_facts_are_consistent():
    for spec in KNOWN.values():
        assert len(spec.classes) == len(spec.palette) == len(set(spec.classes)) == len(set(spec.palette))
        assert set(spec.label_ids.values()) <= {*range(len(spec.classes)), 255}
    assert [len(KNOWN[name].classes) for name in ("voc", "cityscapes", "camvid", "ade20k")] == [21, 19, 11, 150]
    assert voc_palette(21)[15] == (192, 128, 128)
    assert (KNOWN["cityscapes"].label_ids[7], KNOWN["cityscapes"].label_ids[33]) == (0, 18)
    assert (KNOWN["cityscapes"].label_ids[0], KNOWN["cityscapes"].label_ids[29]) == (255, 255)
    ade20k = KNOWN["ade20k"]
    assert (ade20k.label_ids[0], ade20k.classes[ade20k.label_ids[21]], ade20k.classes[ade20k.label_ids[150]]) == (
        255,
        "car",
        "flag",
    )
    assert (KNOWN["camvid"].label_ids[10], KNOWN["camvid"].label_ids[11]) == (10, 255)


def test_find_facts(trees, tmp_path):
    trees.put(tmp_path / "names.txt", "sky\nroad\n")
    assert find_spec("sky, road").classes == find_spec(str(tmp_path / "names.txt")).classes == ("sky", "road")
    with pytest.raises(UserError, match="did you mean camvid"):
        find_spec("camvit")
    with pytest.raises(UserError, match="none twice"):
        find_spec("a,b,a")


def test_values(trees, tmp_path):
    spec = find_spec("sky,road")
    assert with_values(spec, "0=255, 7=0,8=1").label_ids == {0: 255, 7: 0, 8: 1}
    trees.put(tmp_path / "values.txt", "#FF8000 = 1\n\n#000000 = 255\n")
    assert with_values(spec, str(tmp_path / "values.txt")).label_colors == {0xFF8000: 1, 0: 255}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("7=2", "'7=2': ids are 0 to 1, or 255"),
        ("sky=0", "'sky=0' is not VALUE=ID"),
        ("#12=0", "'#12=0' is not VALUE=ID"),
        ("7=0,7=1", "7 is given two ids"),
        ("7=0,#ff0000=1", "and not both"),
        ("256=0", "numbers 0 to 255"),
        ("nowhere.txt", "nowhere.txt: not found"),
    ],
)
def test_mistakes_in_values_are_named(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        with_values(find_spec("sky,road"), text)


def test_files_of_classes_of_other_tools(tmp_path):
    """labelme's list, CVAT's label map and tables with colours, with the ids that their masks have."""
    path = tmp_path / "classes.txt"
    path.write_text("__ignore__\n_background_\ndisk\nbox\n")
    assert find_spec(str(path)).classes == ("_background_", "disk", "box")
    cvat = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ndisk:128,0,0::\nred box:0,128,0::\n"
    table = "name,r,g,b\nbackground,0,0,0\ndisk,128,0,0\nred box, 0, 128, 0\n"
    for text in (cvat, table, table.partition("\n")[2]):
        path.write_text(text)
        spec = find_spec(str(path))
        assert spec.classes == ("background", "disk", "red box")
        assert spec.label_colors == {0: 0, 0x800000: 1, 0x008000: 2}
        assert spec.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    for text in (
        '["background", "disk"]',
        '{"0": "background"}',
        "names:\n- a\n- b\n",
        "- a\n- b\n",
        "id,name\n0,bg\n",
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=r"classes\.txt: .* is no class name; a file of classes has one name"):
            find_spec(str(path))
    path.write_text("__ignore__,224,224,192\na,0,0,0\nb,128,0,0\n")
    assert find_spec(str(path)).classes == ("a", "b")
    assert find_spec(str(path)).label_colors == {0xE0E0C0: 255, 0: 0, 0x800000: 1}
    path.write_text("a,0,0,0\nb,300,0,0\n")
    with pytest.raises(UserError, match="a colour has three numbers of 0 to 255"):
        find_spec(str(path))
    path.write_text("a,0,0,0\nb,0,0,0\n")
    with pytest.raises(UserError, match="two classes have the same colour"):
        find_spec(str(path))


def test_a_list_means_the_images_that_it_names(trees, tmp_path):
    """Dots and spaces are part of a name; an image whose name is only the beginning is never taken."""
    root = trees.voc(tmp_path, train=2)
    for name in ("a0 (1)", "IMG.2024.06.01"):
        trees.put(root / f"JPEGImages/{name}.jpg", trees.image())
        trees.put(root / f"SegmentationClass/{name}.png", trees.mask())
    lists = root / "ImageSets/Segmentation/train.txt"
    lists.write_text("a0 (1)\nIMG.2024.06.01\nJPEGImages/a1.jpg SegmentationClass/a1.png\n")
    assert [each.id for each in read_voc(Folders(str(root))) if each.subset == "train"] == [
        "a0 (1)",
        "IMG.2024.06.01",
        "a1",
    ]
    for line in ("a0 (2)", "a0.v2", "a0.jpg.bak", "/data/a0 stuff/JPEGImages/b.jpg"):
        lists.write_text(f"{line}\n")
        with pytest.raises(UserError, match=rf"train\.txt: names {re.escape(line)}, but JPEGImages has no such file"):
            read_voc(Folders(str(root)))
    lists.write_text("a0\na1\na0\n")
    with pytest.raises(UserError, match=r"train\.txt: a0 is listed twice, as entries 1 and 3"):
        read_voc(Folders(str(root)))


def test_what_lies_beside_images_is_passed_over_or_told(trees, tmp_path):
    for name in ("a.webp", "b.bmp", "c.tif", "d.gif", "e.heic", ".x/f.jpg", "@eaDir/g.jpg", "notes.txt"):
        trees.put(tmp_path / "images/train" / name, b"x")
    samples, passed = read_tree("folder", str(tmp_path), {})
    assert [each.id for each in samples] == ["train/a", "train/b", "train/c"]
    assert passed == {".gif": 1, ".heic": 1}
    trees.put(tmp_path / "masks/train/a.tif", b"x")
    trees.put(tmp_path / "masks/train/.b.png", b"x")
    assert [each.mask_uri is not None for each in read_tree("folder", str(tmp_path), {})[0]] == [True, False, False]
    trees.put(tmp_path / "masks/train/c.npy", b"x")
    assert read_tree("folder", str(tmp_path), {})[1] == {".gif": 1, ".heic": 1, ".npy beside masks": 1}
    trees.put(tmp_path / "masks/train/b.jpg", b"x")
    with pytest.raises(UserError, match=r"masks/train/b\.jpg: masks are files of kind png, tif, tiff \(JPEG changes"):
        read_tree("folder", str(tmp_path), {})


def test_a_folder_without_images_says_what_there_is(trees, tmp_path):
    trees.put(tmp_path / "images/train/a.heic", b"x")
    with pytest.raises(UserError, match=r"images: none of its files is of a kind that is read, such as train/a\.heic"):
        read_tree("folder", str(tmp_path), {})
    with pytest.raises(UserError, match="nowhere/images: no such folder; check --root"):
        read_tree("folder", str(tmp_path / "nowhere"), {})


def test_a_layout_with_ids_of_its_own_asks_what_other_classes_mean(trees, tmp_path):
    flags = ["--root", str(tmp_path), "--out", "x"]
    for source, words in (("ade20k", "as 0 is no class there"), ("camvid", "as 11 is no class there")):
        with pytest.raises(UserError, match=f"--classes a,b: say what the masks hold, {words}: --values"):
            read_raw(parse(["--source", source, "--classes", "a,b", *flags], None))
    with pytest.raises(UserError, match="--source folder needs --classes"):
        read_raw(parse(["--source", "folder", *flags], None))
    with pytest.raises(UserError, match="--workers 0: at least 1"):
        parse(["--source", "folder", "--workers", "0", *flags], None)


def test_what_a_voc_tree_holds_for_nobody_is_counted(trees, tmp_path):
    root = trees.voc(tmp_path, extra=2)
    trees.put(root / "SegmentationClass/a0_mask.png", trees.mask())
    trees.put(root / "SegmentationClass/e0.png", trees.mask())
    trees.put(root / "ImageSets/Segmentation/test.txt", "JPEGImages/e1.jpg\n")
    samples, passed = read_tree("voc", str(root), {})
    assert {"e0", "e1"}.isdisjoint(each.id for each in samples)
    assert passed == {"masks without an image of their name": 1, "images with a mask that no list names": 1}
