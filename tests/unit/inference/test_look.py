"""What pictures say is held against the definitions, pixel by pixel; methods are asked in tests/unit/methods."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.cli import resolve
from pipeline.datasets.prepared.dataset import Dataset, open_dataset
from pipeline.errors import UserError
from pipeline.inference.evaluate import read_images, spread
from pipeline.inference.logits import whole
from pipeline.inference.look import NO_NEGATIVE, Look, drawn, drawn_negatives, look
from pipeline.inference.pictures import GAP, LINE, MARGIN, RELIABLE, UNRELIABLE
from pipeline.methods import OPTIONS, Method, Step, build_method
from pipeline.ops.world import World

AT = Step(5, 20, seed=0, world=World())
SHARE = 0.2 * (1 - 5 / 20)
"""alpha_t there."""


@pytest.fixture(scope="module")
def dataset(shapes: str) -> Dataset:
    return open_dataset(shapes)


def _method(name: str, classes: int, **options: Any) -> Method:
    values = {
        "method": name,
        "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8},
        "optim": {"steps": 20},
        "u2pl": {"queue": 10, "queue_background": 10, **options},
    }
    torch.manual_seed(1)
    used = {key: value for key, value in values.items() if key != "u2pl" or name == "u2pl"}
    method = build_method(resolve(used, OPTIONS), classes)
    with torch.no_grad():  # as decided as a trained one: entropies of any height, and no two alike
        for network in method.networks().values():
            network.decoder.get_parameter("classifier.weight").mul_(30)
    return method


def _looks(method: Method, dataset: Dataset, ids: Sequence[str], side: int = 512) -> list[Look]:
    return look(method, read_images(dataset, ids), dataset, method.config, AT, side)


def _cells(page: Image.Image, rows: int, columns: int, side: int = 64) -> np.ndarray:
    """The pictures of a page, one value for each of their own pixels: uint8 [rows,columns,side,side,3]."""
    pixels, cell = np.asarray(page), 192
    tops = [MARGIN + LINE + row * (cell + GAP) for row in range(rows)]
    lefts = [MARGIN + column * (cell + GAP) for column in range(columns)]
    cut = np.array([[pixels[top : top + cell, left : left + cell] for left in lefts] for top in tops])
    every = cell // side
    assert (cut == cut[:, :, ::every, ::every].repeat(every, 2).repeat(every, 3)).all(), "squares of one colour"
    return cut[:, :, ::every, ::every]


def test_the_pictures_hold_what_the_definitions_say(dataset):
    classes, palette = len(dataset.info.classes), np.array(dataset.info.palette, dtype=np.uint8)
    method, ids = _method("u2pl", classes, r_l=2, r_h=5), spread(dataset, 3)
    samples = read_images(dataset, ids)
    looks = _looks(method, dataset, ids)
    method.eval()
    with torch.no_grad():
        images = [torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None] for sample in samples]
        logits = torch.cat([whole(method.predictor(), image) for image in images]).double()
    p = logits.softmax(1).numpy()
    uncertain = -(p * np.log(p)).sum(1)
    gamma = np.quantile(uncertain, 1 - SHARE)  # over all pixels that are shown
    reliable = uncertain < gamma
    rank = np.array([[[each > other for each in image] for other in image] for image in p]).sum(2)  # O(c), [B,C,H,W]
    negative = ~reliable[:, None] & (rank >= 2) & (rank < 5)
    nearest = ~reliable[:, None] & (rank == 2)  # the likeliest class of a pixel's negatives

    cells = _cells(drawn(looks, dataset), rows=3, columns=6)
    for row, sample in enumerate(samples):
        image, truth, prediction, _, relied, negatives = cells[row]
        assert (image == sample.image).all()
        assert (truth == palette[sample.mask]).all()
        assert (prediction == palette[p[row].argmax(0)]).all()
        assert (relied == np.where(reliable[row][..., None], RELIABLE, UNRELIABLE)).all()
        expected = np.full((64, 64, 3), NO_NEGATIVE, dtype=np.uint8)
        for c in range(classes):
            expected[nearest[row, c]] = palette[c]
        assert (negatives == expected).all()
    assert 0 < (~reliable).sum() < 0.2 * reliable.size
    assert len({tuple(colour) for colour in cells[:, 5].reshape(-1, 3)}) > 2

    tiles = _cells(drawn_negatives(looks, dataset), rows=3, columns=1 + classes)
    for row in range(3):
        for c in range(classes):
            assert (tiles[row, 1 + c] == np.where(negative[row, c][..., None], palette[c], NO_NEGATIVE)).all()


def test_entropy_is_a_share_of_log_c_and_drawn_by_brightness(dataset):
    (seen,) = _looks(_method("u2pl", len(dataset.info.classes)), dataset, spread(dataset, 1))
    assert 0 < seen.entropy.min() < seen.entropy.max() <= 1 + 1e-6
    brightness = _cells(drawn([seen], dataset), rows=1, columns=6)[0, 3] @ np.array([0.299, 0.587, 0.114])
    order = seen.entropy.ravel().argsort()
    assert (np.diff(brightness.ravel()[order]) > -1.5).all(), "but for the rounding of colours"


def test_a_method_that_parts_no_pixels_shows_entropy_alone(dataset):
    looks = _looks(_method("suponly", len(dataset.info.classes)), dataset, spread(dataset, 2))
    assert (looks[0].reliable, looks[0].negative, looks[0].nearest) == (None, None, None)
    assert drawn(looks, dataset).width == 2 * MARGIN + 4 * 192 + 3 * GAP


def test_a_method_without_negatives_shows_no_such_column(dataset):
    looks = _looks(_method("fixmatch", len(dataset.info.classes)), dataset, spread(dataset, 2))
    assert looks[0].reliable is not None
    assert looks[0].negative is None
    assert drawn(looks, dataset).width == 2 * MARGIN + 5 * 192 + 4 * GAP


def test_large_images_are_thinned_out_and_no_pixels_are_mixed(dataset):
    method, ids = _method("suponly", len(dataset.info.classes)), spread(dataset, 1)
    (large,), (small,) = _looks(method, dataset, ids), _looks(method, dataset, ids, side=32)
    assert small.image.shape == (32, 32, 3)
    for one, other in zip(small[1:5], large[1:5], strict=True):
        assert (one == other[::2, ::2]).all()


@pytest.mark.parametrize("mode", [True, False])
def test_nothing_of_the_method_changes(dataset, mode):
    method = _method("u2pl", len(dataset.info.classes)).train(mode)
    next(iter(method.networks().values())).encoder.eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    modes, draws = [part.training for part in method.modules()], torch.get_rng_state()
    _looks(method, dataset, spread(dataset, 2))
    assert [part.training for part in method.modules()] == modes
    assert torch.get_rng_state().equal(draws)
    assert all(value.equal(before[name]) for name, value in method.state_dict().items())


def test_images_are_spread_over_the_set_and_read_by_name(dataset):
    ids = dataset.subset("val").column("id").to_pylist()
    assert spread(dataset, 3) == [ids[0], ids[(len(ids) - 1) // 2], ids[-1]]
    assert spread(dataset, 10**6) == ids
    assert [sample.id for sample in read_images(dataset, [ids[7], ids[2]])] == [ids[7], ids[2]]
    with pytest.raises(UserError, match=rf"shapes: no validation image {ids[3]}x; did you mean {ids[3]}\?"):
        read_images(dataset, [f"{ids[3]}x"])
    with pytest.raises(UserError, match=rf"no validation image @; choose from {ids[0]}, .* and \d+ more$"):
        read_images(dataset, ["@"])
