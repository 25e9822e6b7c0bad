"""Masks of a folder of photos, in one process: what is written, what is refused, what goes on."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import storage
from pipeline.cluster import tasks
from pipeline.commands import predict
from pipeline.datasets.images import decode_image, encode_png
from pipeline.datasets.raw.layouts import read_tree
from pipeline.datasets.raw.masks import canonical_mask, class_lookup
from pipeline.datasets.specs import find_spec
from pipeline.errors import UserError
from pipeline.inference import units
from pipeline.inference.load import Model, load_model, restore
from pipeline.inference.mask_writer import UnitRecord
from pipeline.inference.pictures import overlay
from pipeline.patience import Patience
from pipeline.records import read_record
from pipeline.training.lease import held
from tests.networks import train_briefly

BROKEN = "b/broken.jpg"
ALL = ("--overlays", "--entropy", "--probabilities", "--rank", "margin")


@pytest.fixture(scope="module")
def run(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("run"))
    train_briefly(shapes, out)
    return out


@pytest.fixture(scope="module")
def model(run: str) -> Model:
    return load_model(run)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No Ray: tasks run in this process. Gives the numbers of the units that were asked for; one holds four images."""
    asked: list[int] = []

    def run_here(
        task: Callable, items: Iterable, total: int, doing: str, workers: int | None = None, on_gpus: bool = False
    ) -> Iterator[object]:
        for item in items:
            asked.append(item[1].number)
            yield task(item)

    monkeypatch.setattr(tasks, "run", run_here)
    monkeypatch.setattr(units, "UNIT_IMAGES", 4)
    return asked


def encoded(seed: int, form: str = "JPEG", orientation: int = 1) -> bytes:
    """A smooth picture, 40 wide and 24 or more high."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 5, 3), np.uint8))
    image = coarse.resize((40, 24 + seed), Image.Resampling.BICUBIC)
    exif = image.getexif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, form, **({} if orientation == 1 else {"exif": exif}))
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, bytes]:
    """Ten photos, one of a single pixel, and a broken one in `tmp_path / "photos"`, by path."""
    found = {f"a/{seed}.jpg": encoded(seed) for seed in range(5)}
    found |= {"b/tall.JPG": encoded(6, orientation=6), "b/x.2024.06.png": encoded(7, "PNG")}
    found["dot.png"] = encode_png(np.zeros((1, 1, 3), np.uint8))
    found |= {"web.webp": encoded(8, "WEBP"), "scan.tif": encoded(9, "TIFF"), BROKEN: encoded(1)[:200]}
    for name, data in found.items():
        storage.write_bytes(str(tmp_path / "photos" / name), data)
    storage.write_bytes(str(tmp_path / "photos/.thumbs/a.jpg"), b"x")
    return found


@pytest.fixture
def call(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command with these flags, from photos to out."""
    monkeypatch.chdir(tmp_path)

    def given(*flags: str, out: str = "out") -> None:
        predict([run, "--images", "photos", "--out", out, *flags])

    return given


def files(folder: Path) -> set[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {file for file in found if not file.startswith("lease/")}


def opened(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_what_is_written_of_each_photo(
    call: Callable[..., None], photos: dict[str, bytes], model: Model, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    call(*ALL)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "10 masks in out, 1 image left out (out/left_out.txt names them)"
    assert "photos that note a rotation, which their masks do not follow: 1" in said
    out, stems = tmp_path / "out", {re.sub(r"\.[^.]+$", "", name): data for name, data in photos.items()}
    del stems["b/broken"]
    wanted = {f"{kind}/{stem}.{end}" for stem in stems for kind, end in (
        ("masks", "png"), ("overlays", "jpg"), ("entropy", "png"), ("probabilities", "npz"))}  # fmt: skip
    others = {f"units/{number:07d}.json" for number in range(3)} | {"units/names.txt", "predictions.json"}
    assert files(out) == wanted | others | {"left_out.txt", "ranking.csv", "ranking.html"}
    for stem, data in stems.items():
        pixels = decode_image(data)
        logits = model.logits(pixels)
        mask = Image.open(out / f"masks/{stem}.png")
        assert mask.mode == "P"
        assert np.array_equal(np.asarray(mask), model.predict(pixels))
        assert np.array_equal(np.asarray(mask.convert("RGB")), np.array(model.palette)[np.asarray(mask)])
        p = logits.softmax(0)
        assert np.array_equal(np.load(out / f"probabilities/{stem}.npz")["probabilities"], p.half().numpy())
        exact = -(p.double() * p.double().log()).sum(0).numpy() / np.log(len(model.classes))
        assert np.abs(opened(out / f"entropy/{stem}.png") - 255 * exact).max() <= 0.51
        mixed = overlay(pixels, np.asarray(mask), model.palette).astype(int)
        assert np.abs(opened(out / f"overlays/{stem}.jpg") - mixed).mean() < 8
    assert (out / "left_out.txt").read_text().startswith(f"{BROKEN}: ")


def test_nothing_is_made_beside_the_masks_unless_it_is_asked_for(
    call: Callable[..., None], photos: dict[str, bytes], tmp_path: Path
) -> None:
    call()
    assert {name.partition("/")[0] for name in files(tmp_path / "out")} == {
        "masks", "units", "left_out.txt", "predictions.json"
    }  # fmt: skip
    record = read_record(UnitRecord, (tmp_path / "out/units/0000000.json").read_bytes())
    assert [each.uncertainty for each in record.masks] == [None] * 4


def test_the_same_command_goes_on_and_makes_nothing_twice(
    call: Callable[..., None], photos: dict[str, bytes], here: list[int], tmp_path: Path
) -> None:
    call("--rank", "entropy")
    out = tmp_path / "out"
    stamps = {path: path.stat().st_mtime_ns for path in (out / "masks").rglob("*.png")}
    (out / "units/0000001.json").unlink()
    here.clear()
    call("--rank", "margin")  # what is measured is the same
    assert here == [1]
    again = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    listed = sorted(photos)
    assert {str(path.relative_to(out / "masks")) for path in again} == {"a/4.png", "b/tall.png", "b/x.2024.06.png"}
    assert listed[4:8] == ["a/4.jpg", BROKEN, "b/tall.JPG", "b/x.2024.06.png"]
    here.clear()
    call("--rank", "margin")
    assert here == []


def test_a_copy_is_not_labeled_beside_its_original(
    call: Callable[..., None], photos: dict[str, bytes], run: str, tmp_path: Path
) -> None:
    def order(*options: str) -> list[str]:
        call("--rank", "entropy", "--overwrite", *options)
        return [line.split(",")[1] for line in (tmp_path / "out/ranking.csv").read_text().splitlines()[1:]]

    best = order()[0]
    (name,) = (name for name in photos if name.startswith(f"{best}."))
    storage.write_bytes(str(tmp_path / "photos/copy.jpg"), photos[name])
    plain = order()
    assert set(plain[:2]) == {best, "copy"}
    assert "also differ" not in (tmp_path / "out/ranking.html").read_text()
    diverse = order("--diverse", "5")
    assert "The first 5 also differ in what they show" in (tmp_path / "out/ranking.html").read_text()
    assert diverse[0] == plain[0]
    assert plain[1] not in diverse[:5]
    assert sorted(diverse) == sorted(plain)
    record = read_record(UnitRecord, (tmp_path / "out/units/0000000.json").read_bytes())
    image = torch.from_numpy(decode_image(photos["a/0.jpg"]).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        network = next(iter(restore(run, torch.device("cpu"))[1].networks().values()))
        high = network.encode(image).high
    assert record.masks[0].fingerprint == pytest.approx(high.mean((0, 2, 3)).tolist(), rel=1e-3)


@pytest.mark.parametrize("options", [("--diverse", "3"), ("--diverse", "-1", "--rank", "margin")])
def test_how_many_differ_is_asked_of_a_ranking(call: Callable[..., None], options: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="--diverse: how many images to choose, more than 0, together with --rank"):
        call(*options)


@pytest.mark.parametrize("what", ["network", "options", "images", "half"])
def test_another_command_is_refused(
    call: Callable[..., None], run: str, photos: dict[str, bytes], tmp_path: Path, what: str, shapes: str
) -> None:
    call()
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    if what == "network":
        meta = next(Path(run).glob("*/checkpoint.json"))
        other = tmp_path / "other/step_0000060"
        other.mkdir(parents=True)
        state = torch.load(meta.parent / "state.pt", weights_only=True)
        torch.save({**state, "more": 1}, other / "state.pt")
        text = json.loads(meta.read_text())
        sha = hashlib.sha256((other / "state.pt").read_bytes()).hexdigest()
        (other / "checkpoint.json").write_text(json.dumps({**text, "sha256": sha}))
        with pytest.raises(UserError, match=r"holds masks made by another network .*step_0000060.*--overwrite"):
            predict([str(tmp_path / "other"), "--images", "photos", "--out", "out"])
    elif what == "options":
        with pytest.raises(UserError, match=r"out: holds masks made with other options \(none\); --overwrite"):
            call("--overlays")
    elif what == "images":
        storage.write_bytes(str(tmp_path / "photos/new.jpg"), encoded(3))
        with pytest.raises(UserError, match="holds masks made of another list of images"):
            call()
    else:
        (tmp_path / "out/predictions.json").write_text("{")
        with pytest.raises(UserError, match=r"predictions\.json: not readable"):
            call("--overwrite")
        before["predictions.json"] = b"{"
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")} == before


def test_a_place_with_files_of_others_stays_as_it_is(
    call: Callable[..., None], photos: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    for flags in ((), ("--overwrite",)):
        with pytest.raises(UserError, match=r"holds files that predict did not write, such as notes\.txt"):
            call(*flags, out="mine")
    with pytest.raises(UserError, match="lies inside --images"):
        call(out="photos/masks")
    assert files(tmp_path / "mine") == {"notes.txt"}
    assert not (tmp_path / "mine/lease").exists()
    assert not (tmp_path / "photos/masks").exists()


def test_two_commands_cannot_write_into_one_place(
    call: Callable[..., None], photos: dict[str, bytes], tmp_path: Path
) -> None:
    with (
        held(str(tmp_path / "out"), Patience()),
        pytest.raises(UserError, match=r"out is being written by .*: wait for it, end it, or use another --out"),
    ):
        call()
    assert files(tmp_path / "out") == set()


def test_overwrite_deletes_what_predict_wrote_and_nothing_else(
    call: Callable[..., None], photos: dict[str, bytes], here: list[int], tmp_path: Path
) -> None:
    call(*ALL)
    out = tmp_path / "out"
    mine = {"masks/mine.png", "masks/a/0.txt", "notes.txt", "units/0000000.txt"}
    for name in mine:
        (out / name).write_text("x")
    (out / "masks/a/0.png.0123abcd.tmp").write_text("half")  # a killed write
    storage.delete(str(tmp_path / "photos/a/3.jpg"))
    call("--overwrite")
    kept = {"masks", "units", "left_out.txt", "predictions.json"}
    assert {name.partition("/")[0] for name in files(out) - mine} == kept
    assert mine < files(out)
    assert not {name for name in files(out) if name.startswith("masks/a/3") or name.endswith(".tmp")}
    assert not (out / "overlays").exists()
    record = json.loads((out / "predictions.json").read_text())
    (out / "predictions.json").write_text(json.dumps({**record, "finished": False}))
    (out / "units/0000000.json").unlink()
    here.clear()
    call("--overwrite")  # cut off, it goes on
    assert here == [0]


def test_photos_of_which_none_can_be_read(
    call: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    storage.write_bytes(str(tmp_path / "photos/a.jpg"), b"")
    with pytest.raises(UserError, match=r"photos: none of its 1 images can be read; a\.jpg: no bytes"):
        call("--rank", "entropy")
    storage.write_bytes(str(tmp_path / "photos/a.jpg"), encoded(1))
    call("--overwrite")
    assert capsys.readouterr().out.endswith("1 masks in out\n")


def test_a_damaged_record_is_named(call: Callable[..., None], photos: dict[str, bytes], tmp_path: Path) -> None:
    call()
    (tmp_path / "out/units/0000002.json").write_text('{"masks": []}')
    with pytest.raises(UserError, match=r"0000002\.json: damaged \(left_out: .*; delete it and give the command again"):
        call()


def test_a_voc_tree_is_read_back(
    call: Callable[..., None], photos: dict[str, bytes], model: Model, tmp_path: Path
) -> None:
    """As `u2pl prepare --source voc --root out --classes out/labelmap.txt` reads it."""
    call("--as_dataset", "voc", "--overlays")
    out = tmp_path / "out"
    (out / "val.txt").write_text("web\n")
    every = (out / "ImageSets/Segmentation/train.txt").read_text().split()
    (out / "most.txt").write_text("".join(f"{name}\n" for name in every if name != "web"))
    options = {"train_list": str(out / "most.txt"), "val_list": str(out / "val.txt")}
    samples, passed = read_tree("voc", str(out), options)
    assert not passed
    assert {each.id for each in samples} == set(every)
    assert [each.id for each in samples if each.subset == "val"] == ["web"]
    spec = find_spec(str(out / "labelmap.txt"))
    assert (spec.classes, spec.palette) == (model.classes, model.palette)
    sources = {re.sub(r"\.[^.]+$", "", name).replace("/", "__"): data for name, data in photos.items()}
    for each in samples:
        data, pixels = storage.read_bytes(each.image_uri), decode_image(sources[each.id])
        assert np.array_equal(decode_image(data), pixels)
        assert (data == sources[each.id]) == (each.id not in ("b__tall", "scan"))
        assert each.mask_uri
        lookup = class_lookup(len(spec.classes))
        mask = canonical_mask(storage.read_bytes(each.mask_uri), pixels.shape[:2], lookup, spec.label_colors)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask.data))), model.predict(pixels))
    tall = Image.open(out / "JPEGImages/b__tall.png")
    assert tall.getexif().get(0x0112, 1) == 1


def test_a_dataset_can_be_looked_at(run: str, shapes: str, tmp_path: Path, model: Model) -> None:
    predict([run, "--images", shapes, "--subset", "val", "--out", str(tmp_path / "out"), "--rank", "unreliable"])
    assert len(list((tmp_path / "out/masks").rglob("*.png"))) == 150
    page = (tmp_path / "out/ranking.html").read_text()
    assert "<h1>48 of 150 images to label next, by unreliable</h1>" in page
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', page)) == 48
    assert page.count('width="132" height="64"') == 48  # 64 pixels each, and a gap of 4
    assert all(name in page for name in model.classes)
    lines = (tmp_path / "out/ranking.csv").read_text().splitlines()
    assert len(lines) == 151
    shares = [float(line.split(",")[-1]) for line in lines[1:]]
    assert 0 < np.mean(shares) <= 0.2
    first = lines[1].split(",")[1]
    assert page.index(f"1. {first}: ") < page.index("2. ")
