"""A trained network for people: an image in, class ids out."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import checkpoint
from pipeline.checkpoint import Progress
from pipeline.config.cli import resolve
from pipeline.errors import UserError
from pipeline.inference.load import load_model
from pipeline.inference.logits import sliding, whole
from pipeline.methods import OPTIONS, build_method

ABOUT = {"palette": [[0, 0, 0], [9, 9, 9], [5, 6, 7]], "evaluation": "whole"}
PIXELS = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)


@pytest.fixture
def saved(tmp_path):
    """Writes a checkpoint into a run directory and names the directory."""

    def save(about: dict, **evaluation: object) -> str:
        values = {
            "method": "mean_teacher",
            "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8, "width": 16},
            "eval": evaluation,
        }
        config = resolve(values, OPTIONS)
        torch.manual_seed(0)
        method = build_method(config, 3)
        folder = tmp_path / "run" / checkpoint.name(1)
        folder.mkdir(parents=True)
        data = {"index": "i", "split": "s", "classes": ["sky", "road", "car"]}
        checkpoint.save(folder, config, data, about, Progress(1), method=method.state_dict(), optimizer={})
        return str(tmp_path / "run")

    return save


def test_all_kinds_of_images_give_the_same_ids(saved, tmp_path):
    model = load_model(saved(ABOUT))
    assert model.classes == ("sky", "road", "car")
    assert model.palette == ((0, 0, 0), (9, 9, 9), (5, 6, 7))
    file = tmp_path / "photo.png"
    Image.fromarray(PIXELS).save(file)
    found = model.predict(PIXELS)
    assert (found.shape, found.dtype) == ((40, 56), np.uint8)
    assert set(np.unique(found)) <= {0, 1, 2}
    for image in (file, str(file), Image.fromarray(PIXELS), Image.fromarray(PIXELS).convert("RGBA")):
        assert np.array_equal(model.predict(image), found)


@pytest.mark.parametrize(
    ("about", "evaluation", "slides"),
    [
        ("whole", {}, False),
        ("sliding", {"window": [32, 32]}, True),
        ("whole", {"mode": "sliding", "window": [32, 32]}, True),
    ],
)
def test_scores_are_those_of_the_evaluation(saved, about, evaluation, slides):
    model = load_model(saved({**ABOUT, "evaluation": about}, scale=0.5, **evaluation))
    image = torch.from_numpy(PIXELS).permute(2, 0, 1).unsqueeze(0)
    with torch.no_grad():
        one, other = whole(model.network, image, 0.5)[0], sliding(model.network, image, (32, 32), 0.5)[0]
    assert torch.equal(model.logits(PIXELS), other if slides else one)
    assert not torch.equal(one, other)


def test_what_is_no_image_is_one_line(saved, tmp_path):
    model = load_model(saved(ABOUT))
    (tmp_path / "text.jpg").write_text("no image")
    for image, words in (
        (tmp_path / "text.jpg", r"text\.jpg: "),
        (tmp_path / "gone.jpg", r"gone\.jpg: not found"),
        (PIXELS[..., 0], r"expected uint8 \[H,W,3\], got uint8 \[40, 56\]"),
        (PIXELS.astype(np.float32), "got float32"),
    ):
        with pytest.raises(UserError, match=words):
            model.predict(image)


def test_a_checkpoint_of_before_is_refused_in_one_line(saved):
    with pytest.raises(UserError, match="made by an older version"):
        load_model(saved({}))


def test_pictures_of_other_formats_go_through_pillow(saved):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "WEBP", lossless=True)
    model = load_model(saved(ABOUT))
    assert np.array_equal(model.predict(Image.open(buffer)), model.predict(PIXELS))
