import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.datasets.images import decode_image, decode_mask
from pipeline.datasets.prepared import pseudo
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.inference import label as module
from pipeline.inference.label import Labeler, Labeling, ShardJob
from pipeline.inference.load import restore
from pipeline.inference.logits import whole
from pipeline.ingest.groups import Group, select_groups
from pipeline.ingest.read import read_rows
from pipeline.patience import Patience
from tests.networks import train_briefly

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_briefly(shapes, str(tmp_path_factory.mktemp("teacher")))


def _first(shapes: str) -> Group:
    dataset = open_dataset(shapes)
    return select_groups(dataset, load_split(dataset, "1_4").unlabeled)[0]


def _probability(teacher: str, image: bytes) -> Tensor:
    """What the network says of the image as it is, with nothing of the code under test."""
    network = restore(teacher, CPU)[1].predictor()
    with torch.no_grad():
        return whole(network, torch.from_numpy(decode_image(image)).permute(2, 0, 1)[None]).softmax(1)[0]


def test_plain_labels_are_the_argmax(shapes, teacher):
    labeler = Labeler(Labeling(shapes, teacher, tta=False, keep=1.0), CPU)
    seen = set()
    for image in read_rows(_first(shapes), None, Patience())["image"].to_pylist():
        label = labeler.classes(image)
        assert label.dtype == np.uint8
        assert np.array_equal(label, _probability(teacher, image).argmax(0).numpy())
        seen |= set(np.unique(label).tolist())
    assert len(seen) > 1


def test_several_looks_are_averaged(shapes, teacher):
    image = read_rows(_first(shapes), None, Patience())["image"][0].as_py()
    network, pixels = restore(teacher, CPU)[1].predictor(), torch.from_numpy(decode_image(image)).permute(2, 0, 1)[None]
    look = partial(whole, network)
    with torch.no_grad():
        looks = [look(pixels, scale=scale).softmax(1) for scale in module.SCALES]
        looks += [look(pixels.flip(3), scale=scale).softmax(1).flip(3) for scale in module.SCALES]
    expected = torch.stack(looks).mean(0).argmax(1)[0].numpy()
    found = Labeler(Labeling(shapes, teacher, tta=True, keep=1.0), CPU).classes(image)
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, looks[2].argmax(1)[0].numpy())


@pytest.mark.parametrize("keep", [0.1, 0.8])
def test_the_least_certain_pixels_get_no_label(shapes, teacher, keep):
    image = read_rows(_first(shapes), None, Patience())["image"][0].as_py()
    label = Labeler(Labeling(shapes, teacher, tta=False, keep=keep), CPU).classes(image)
    probability = _probability(teacher, image)
    entropy = -(probability * probability.log()).sum(0).numpy()
    kept = label != 255
    assert kept.mean() == pytest.approx(keep, abs=0.001)
    assert entropy[kept].max() <= entropy[~kept].min() + 1e-5
    assert np.array_equal(label[kept], probability.argmax(0).numpy()[kept])


def test_a_damaged_image_is_no_obstacle(shapes, teacher):
    labeler = Labeler(Labeling(shapes, teacher, tta=False, keep=1.0), CPU)
    assert (labeler.classes(b"no picture") == 255).all()


def test_a_shard_is_labeled_once(shapes, teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    groups = [group for group in _groups(shapes) if group.shard == _first(shapes).shard]
    labeler = Labeler(Labeling(shapes, teacher, tta=False, keep=1.0), CPU)
    job = ShardJob(str(tmp_path), "d", groups)
    labeler.label(job)
    for group in groups:
        labels = pseudo.read_labels(str(tmp_path), group.shard, group.row_group, group.ids).to_pylist()
        images = read_rows(group, None, Patience())["image"].to_pylist()
        for image, label in zip(images, labels, strict=True):
            assert np.array_equal(decode_mask(label), labeler.classes(image))
            assert Image.open(io.BytesIO(label)).mode == "L"
    monkeypatch.setattr(labeler, "classes", None)  # a second look would fail
    labeler.label(job)
    with pytest.raises(TypeError):
        labeler.label(job._replace(digest="other"))


def _groups(shapes: str) -> list[Group]:
    dataset = open_dataset(shapes)
    return list(select_groups(dataset, load_split(dataset, "1_4").unlabeled))
