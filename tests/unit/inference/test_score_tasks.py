"""Scores of a checkpoint, its tasks in this process: against a plain loop over the images."""

import dataclasses
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import commands, storage
from pipeline.cluster import tasks
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.prepare import prepare
from pipeline.datasets.raw.flags import parse, read_raw
from pipeline.datasets.specs import KNOWN
from pipeline.errors import UserError
from pipeline.inference import measures as counting
from pipeline.inference import score_tasks
from pipeline.inference.evaluate import Sample
from pipeline.inference.load import Model, load_model
from pipeline.inference.logits import averaged, sliding, whole
from pipeline.inference.measures import Tally
from pipeline.inference.score_tasks import plan, release_crop, score, submitted
from tests.networks import train_briefly
from tests.unit.datasets.conftest import Trees

SIZES = [(33, 47), (20, 24), (20, 24), (20, 24), (47, 33), (64, 65), (9, 9)]
LOOKS = {"scales": (0.5, 1.0, 1.5), "flip": True}


@pytest.fixture(scope="module", autouse=True)
def _here() -> Iterator[None]:
    """No Ray: tasks run in this process."""

    def run_here(
        task: Callable, items: Iterable, total: int, doing: str, workers: int | None = None, on_gpus: bool = False
    ) -> Iterator[object]:
        return map(task, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "run", run_here)
        yield


@pytest.fixture(scope="module")
def run(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("run"))
    train_briefly(shapes, out, "mean_teacher")
    return out


@pytest.fixture(scope="module")
def model(run: str) -> Model:
    return load_model(run)


class Odd:
    """Images of odd sizes in folders, whose masks show ignored pixels; val 6 is ignored everywhere."""

    def __init__(self, folder: Path) -> None:
        self.images: dict[str, np.ndarray] = {}
        self.masks: dict[str, np.ndarray] = {}
        for number, (height, width) in enumerate(SIZES):
            rng = np.random.default_rng(number)
            coarse = Image.fromarray(rng.integers(0, 255, (4, 5, 3), np.uint8))
            photo = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
            labels = Image.fromarray(rng.choice(np.array([0, 0, 1, 2, 5, 255], np.uint8), (3, 4)))
            mask = np.asarray(labels.resize((width, height), Image.Resampling.NEAREST))
            name = f"val/{number}"
            self.images[name], self.masks[name] = photo, np.full_like(mask, 255) if number == 6 else mask
            Trees.put(folder / f"images/{name}.png", Trees.encode(photo))
            Trees.put(folder / f"masks/{name}.png", Trees.encode(self.masks[name]))
            if number < 3:
                Trees.put(folder / f"images/train/t{number}.png", Trees.encode(photo))
            if number < 2:
                Trees.put(folder / f"masks/train/t{number}.png", Trees.encode(self.masks[name]))
        self.root = prepared(folder, "shapes")


def prepared(folder: Path, classes: str) -> str:
    """The folders `images` and `masks` in `folder` as a dataset."""
    root = str(folder / "set")
    flags = ["--source", "folder", "--root", str(folder), "--classes", classes, "--out", root]
    samples, spec, _ = read_raw(parse(flags, ""))
    prepare(samples, root, name="odd", spec=spec, seed=0)
    return root


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Odd:
    return Odd(tmp_path_factory.mktemp("odd"))


def predictions(model: Model, odd: Odd, look: Callable[..., torch.Tensor], **looks: object) -> dict[str, np.ndarray]:
    """The most probable class by image, each looked at alone."""
    found = {}
    for name, pixels in odd.images.items():
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            scales, mirror = looks.get("scales", (1.0,)), bool(looks.get("flip"))
            found[name] = averaged(look, image, scales, mirror=mirror).argmax(1)[0].numpy()  # type: ignore[arg-type]
    return found


def confusion(masks: dict[str, np.ndarray], seen: dict[str, np.ndarray]) -> np.ndarray:
    found = np.zeros((6, 6), np.int64)
    for name, mask in masks.items():
        keep = mask != 255
        np.add.at(found, (mask[keep], seen[name][keep]), 1)
    return found


def mean_iou(matrix: np.ndarray) -> float:
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return float(np.mean(matrix.diagonal()[union > 0] / union[union > 0]))


@pytest.mark.parametrize("looks", [{}, LOOKS])
@pytest.mark.parametrize("window", [None, (17, 23), (24, 30)])
def test_it_equals_a_plain_loop(run, model, odd, looks, window):
    def look(image: torch.Tensor, scale: float) -> torch.Tensor:
        return sliding(model.network, image, window, scale) if window else whole(model.network, image, scale)

    job = plan(run, odd.root, mode="sliding" if window else None, window=window, **looks)
    tally = score(job)["teacher"]
    seen = predictions(model, odd, look, **looks)
    assert np.array_equal(tally.confusion.matrix.numpy(), confusion(odd.masks, seen))
    assert len({*np.concatenate([each.ravel() for each in seen.values()])}) > 1
    assert tally.images == {
        name: pytest.approx(mean_iou(confusion({name: odd.masks[name]}, seen))) for name in odd.masks if name != "val/6"
    }
    assert job.images == 7


def test_no_batch_changes_a_count(run, odd):
    tallies = [score(plan(run, odd.root, batch=batch, **LOOKS)) for batch in (None, 1, 2, 50)]
    for name in ("teacher", "student"):
        for other in tallies[1:]:
            assert torch.equal(other[name].confusion.matrix, tallies[0][name].confusion.matrix)
            assert torch.equal(other[name].boundary, tallies[0][name].boundary)
            assert torch.equal(other[name].bins[[0, 2]], tallies[0][name].bins[[0, 2]])
            assert job_measures(other[name]) == pytest.approx(job_measures(tallies[0][name]), abs=1e-6)
    assert not torch.equal(tallies[0]["teacher"].confusion.matrix, tallies[0]["student"].confusion.matrix)


def job_measures(tally: Tally) -> float:
    return counting.measures(tally).calibration_error


def test_of_train_the_images_with_a_mask_are_scored(run, odd, model):
    job = plan(run, odd.root, "train")
    masks = {name: odd.masks[name] for name in ("val/0", "val/1")}
    seen = predictions(model, odd, lambda image, scale: whole(model.network, image, scale))
    assert job.images == 2
    assert np.array_equal(score(job)["teacher"].confusion.matrix.numpy(), confusion(masks, seen))


def test_the_worst_images_are_shown(run, odd, monkeypatch):
    monkeypatch.setattr(counting, "WORST", 2)
    assert score(plan(run, odd.root))["teacher"].worst == []
    tally = score(plan(run, odd.root, pictures=True))["teacher"]
    expected = sorted(tally.images, key=lambda name: tally.images[name])[:2]
    assert [each.id for each in tally.worst] == expected
    height, width = odd.masks[expected[0]].shape
    assert tally.worst[0].picture.shape == (height, 3 * width + 8, 3)
    assert np.array_equal(tally.worst[0].picture[:, :width], odd.images[expected[0]])
    colors = np.array([*KNOWN["shapes"].palette, (150, 150, 150)])
    truth = np.where(odd.masks[expected[0]] == 255, 6, odd.masks[expected[0]])
    assert np.array_equal(tally.worst[0].picture[:, width + 4 : 2 * width + 4], colors[truth])


# ---- the release's way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(375, 500), (500, 334), (513, 513), (520, 601), (600, 101)])
def test_the_release_scores_a_window_in_the_middle(size):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 255, (*size, 3), np.uint8), rng.integers(1, 21, size, np.uint8)
    found = release_crop(Sample("x", image, mask))
    gaps = [((gap := max(0, 513 - side)) // 2, gap - gap // 2) for side in size]
    padded = np.pad(mask, gaps)
    colour = [np.pad(image[..., at], gaps, constant_values=value) for at, value in enumerate((124, 116, 104))]
    top, left = ((side - 513) // 2 for side in padded.shape)
    window = (slice(top, top + 513), slice(left, left + 513))
    assert np.array_equal(found.mask, padded[window])
    assert np.array_equal(found.image, np.stack(colour, -1)[window])
    if size == (375, 500):
        assert 0.287 < np.mean(found.mask == 0) < 0.289


def test_the_padding_is_scored_as_background(run, model, odd):
    job = plan(run, odd.root, mode="voc_crop513")
    tally = score(job)["teacher"]
    crops = {name: release_crop(Sample(name, image, odd.masks[name])) for name, image in odd.images.items()}
    seen = {name: model.predict(crop.image) for name, crop in crops.items()}
    assert np.array_equal(
        tally.confusion.matrix.numpy(), confusion({name: crop.mask for name, crop in crops.items()}, seen)
    )
    assert int(tally.confusion.matrix.sum()) == 7 * 513**2 - sum(np.sum(mask == 255) for mask in odd.masks.values())
    iou = job.measures(tally).iou
    assert None not in iou  # an absent class counts 0 in the release
    assert str(job.recipe.way) == "voc_crop513"


# ---- submissions --------------------------------------------------------------------------------------------------


def test_a_submission_reads_back_to_the_predictions(run, model, odd, tmp_path):
    out = tmp_path / "sub"
    for _ in range(2):  # the same command may be given again
        score(plan(run, odd.root, submission=str(out)))
    assert {*storage.list_files(str(out))} == {f"{name}.png" for name in odd.images}
    for name, pixels in odd.images.items():
        image = Image.open(out / f"{name}.png")
        assert image.mode == "P"
        ids = np.asarray(image)
        assert np.array_equal(ids, model.predict(pixels))
        assert np.array_equal(np.asarray(image.convert("RGB")), np.array(KNOWN["shapes"].palette, np.uint8)[ids])


def test_cityscapes_gets_label_ids(odd):
    dataset = open_dataset(odd.root)
    spec = KNOWN["cityscapes"]
    info = dataclasses.replace(dataset.info, classes=spec.classes, palette=spec.palette, pixels={})
    mask = np.arange(19, dtype=np.uint8).reshape(1, 19)
    image = Image.open(io.BytesIO(submitted(mask, dataclasses.replace(dataset, info=info))))
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [
        [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    ]  # fmt: skip


def test_a_file_that_cannot_be_written_costs_no_scores(run, odd, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file is in the way of a folder"):
        commands.evaluate([run, "--data", odd.root, "--json", str(tmp_path / "file" / "scores.json")])
    assert re.fullmatch(r"val mIoU student \d+\.\d\d( over . of 6 classes)?", capsys.readouterr().out.splitlines()[-1])


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"data": "nowhere"}, r"nowhere: no dataset there .*u2pl prepare"),
        ({"scales": (1.0, 0.0)}, r"--scales 1 0: above 0, at most 8"),
        ({"scales": (float("nan"),)}, r"--scales nan: above 0"),
        ({"scales": (9.0,)}, r"--scales 9: "),
        ({"batch": 0}, r"--batch 0: at least 1"),
        ({"mode": "sliding"}, r"sliding: the window of 769x769 covers every image of .* \(at most 64x64\).*--window"),
        ({"mode": "sliding", "window": (64, 64)}, r"the window of 64x64 covers every image"),
        ({"mode": "sliding", "window": (0, 9)}, r"--window 0 9: at least 1 pixel"),
        ({"window": (9, 9)}, r"--window is for --mode sliding; here it is whole"),
        ({"mode": "voc_crop513", "submission": "sub"}, r"--export_submission wants whole images; leave out --mode"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, flags, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=line) as raised:
        plan(run, **flags)
    assert "\n" not in str(raised.value)


def test_a_larger_scale_may_make_the_window_slide(run):
    assert str(plan(run, mode="sliding", window=(64, 64), scales=[1.5]).recipe.way) == "sliding 64x64, scales 1.5"
    assert str(plan(run, mode="sliding", window=(65, 20), flip=True).recipe.way) == "sliding 65x20, flip"


def tiny_set(folder: Path, classes: str) -> str:
    """A dataset of two black images."""
    for subset in ("train", "val"):
        Trees.put(folder / f"images/{subset}/{subset}.png", Trees.encode(np.zeros((8, 9, 3), np.uint8)))
        Trees.put(folder / f"masks/{subset}/{subset}.png", Trees.encode(np.zeros((8, 9), np.uint8)))
    return prepared(folder, classes)


def test_a_set_without_background_has_no_crop_of_the_release(run, tmp_path, monkeypatch):
    root = tiny_set(tmp_path, "a,b,c,d,e,f")
    monkeypatch.setattr(score_tasks, "open_data", lambda config, classes, data: open_dataset(data))
    assert plan(run, root).images == 1
    with pytest.raises(
        UserError, match=r"pads masks with class 0, which is background in VOC, but a in .*; take whole"
    ):
        plan(run, root, mode="voc_crop513")


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        ("a,b", "has 2 classes, the checkpoint 6"),
        ("background,disk,triangle,square,cross,ring", "class 2 is triangle, but square in the checkpoint; prepare"),
    ],
)
def test_other_classes_and_another_order_are_refused(run, tmp_path, classes, line):
    with pytest.raises(UserError, match=line):
        plan(run, tiny_set(tmp_path, classes))


def test_the_background_of_labelme_is_the_same_class(run, tmp_path):
    assert plan(run, tiny_set(tmp_path, "_background_,Disk,square,triangle,cross,ring")).images == 1


def test_a_submission_does_not_lie_among_other_files(run, odd, tmp_path):
    storage.write_bytes(str(tmp_path / "sub/notes.txt"), b"x")
    with pytest.raises(
        UserError, match=r"sub: holds other files, such as notes.txt; choose an empty --export_submission"
    ):
        plan(run, odd.root, submission=str(tmp_path / "sub"))
