"""What each layout yields, and what is said about broken trees."""

from pathlib import Path

import pytest

from pipeline.datasets.facts import KNOWN, find_facts, voc_palette
from pipeline.datasets.prepare import check_samples
from pipeline.datasets.readers import RawSample, read_cityscapes, read_folder, read_tree, read_voc
from pipeline.errors import UserError

SHARED = Path(__file__).parents[3] / "../shared"


def test_voc_lists_decide_and_the_rest_is_unlabeled(trees, tmp_path):
    samples = {each.id: each for each in read_voc(str(trees.voc(tmp_path, train=3, extra=2, masked=2)))}
    assert sorted(samples) == ["a0", "a1", "a2", "e0", "e1", "v0", "v1"]
    assert [key for key, each in samples.items() if each.mask_uri is None] == ["a2", "e0", "e1"]
    assert {key for key, each in samples.items() if each.subset == "val"} == {"v0", "v1"}


def test_voc_test_images_are_left_out(trees, tmp_path):
    root = trees.voc(tmp_path, extra=2)
    trees.put(root / "ImageSets/Segmentation/test.txt", "e0\n")
    assert {each.id for each in read_voc(str(root))} >= {"e1"}
    assert "e0" not in {each.id for each in read_voc(str(root))}


def test_voc_augmented_masks_win_if_their_list_is_there(trees, tmp_path):
    root = trees.voc(tmp_path, train=2, extra=1)
    for name in ("a0", "a1", "e0", "v0", "v1"):
        trees.put(root / f"SegmentationClassAug/{name}.png", trees.mask())
    assert all("SegmentationClass/" in each.mask_uri for each in read_voc(str(root)) if each.mask_uri)
    trees.put(root / "ImageSets/Segmentation/trainaug.txt", "a0\na1\ne0\n")
    samples = read_voc(str(root))
    assert all("SegmentationClassAug/" in str(each.mask_uri) for each in samples)
    classic = read_voc(str(root), masks="SegmentationClass", train_list="trainaug")
    assert [each.id for each in classic if each.mask_uri is None] == ["e0"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("SegmentationClass/v1.png", "v1: a validation image without a mask"),
        ("JPEGImages/a1.jpg", "names a1"),
        ("ImageSets/Segmentation/train.txt", "not found"),
    ],
)
def test_voc_missing_files_are_named(trees, tmp_path, spoil, words):
    root = trees.voc(tmp_path)
    (root / spoil).unlink()
    with pytest.raises(UserError, match=words):
        read_voc(str(root))


def test_wrong_root_is_named(tmp_path):
    with pytest.raises(UserError, match="JPEGImages: no JPEG or PNG files"):
        read_voc(str(tmp_path))
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
    samples = {each.id: each for each in read_cityscapes(str(tmp_path))}
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
        read_cityscapes(str(tmp_path))


def test_folder(trees, tmp_path):
    for name in ("train/x/1.jpg", "train/2.png", "val/1.jpg"):
        trees.put(tmp_path / "images" / name, trees.image())
    for name in ("train/x/1.png", "val/1.png"):
        trees.put(tmp_path / "masks" / name, trees.mask())
    samples = {each.id: (each.subset, each.mask_uri is not None) for each in read_folder(str(tmp_path))}
    assert samples == {"train/x/1": ("train", True), "train/2": ("train", False), "val/1": ("val", True)}


def test_folder_of_images_alone_is_a_pool(trees, tmp_path):
    trees.put(tmp_path / "images/train/1.jpg", trees.image())
    samples = read_folder(str(tmp_path))
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
        read_folder(str(tmp_path))


def test_check_samples():
    one = RawSample("a", "train", "x/a.jpg", "m/a.png")
    with pytest.raises(UserError, match=r"duplicate id a: x/a.jpg and y/a.jpg"):
        check_samples([one, RawSample("a", "train", "y/a.jpg", None)])
    with pytest.raises(UserError, match="no train images"):
        check_samples([RawSample("v", "val", "v.jpg", "v.png")])
    with pytest.raises(UserError, match="no validation images"):
        check_samples([one])


def test_facts_are_consistent():
    for facts in KNOWN.values():
        assert len(facts.classes) == len(facts.palette) == len(set(facts.classes)) == len(set(facts.palette))
        assert set(facts.label_ids.values()) <= {*range(len(facts.classes)), 255}
    assert [len(KNOWN[name].classes) for name in ("voc", "cityscapes", "camvid", "shapes")] == [21, 19, 11, 6]
    assert voc_palette(21)[15] == (192, 128, 128)
    assert (KNOWN["cityscapes"].label_ids[7], KNOWN["cityscapes"].label_ids[33]) == (0, 18)
    assert (KNOWN["cityscapes"].label_ids[0], KNOWN["cityscapes"].label_ids[29]) == (255, 255)


def test_find_facts(trees, tmp_path):
    trees.put(tmp_path / "names.txt", "sky\nroad\n")
    assert find_facts("sky, road").classes == find_facts(str(tmp_path / "names.txt")).classes == ("sky", "road")
    with pytest.raises(UserError, match="did you mean camvid"):
        find_facts("camvit")
    with pytest.raises(UserError, match="none twice"):
        find_facts("a,b,a")


def test_real_camvid_tree():
    samples = read_voc(str(SHARED / "camvid"))
    assert [sum(each.subset == name for each in samples) for name in ("train", "val")] == [367, 101]
    assert all(each.mask_uri for each in samples)
