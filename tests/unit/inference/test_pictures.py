import numpy as np
import pytest
from PIL import ImageFont

from pipeline.inference import pictures
from pipeline.inference.pictures import IGNORED, RELIABLE, UNRELIABLE, colour_mask, heat, panel, reliability

PALETTE = ((10, 20, 30), (200, 0, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_colour_mask(dtype):
    colours = colour_mask(np.array([[0, 1], [255, 2]], dtype=dtype), PALETTE)
    assert colours.dtype == np.uint8
    assert [tuple(pixel) for pixel in colours.reshape(-1, 3)] == [PALETTE[0], PALETTE[1], IGNORED, IGNORED]
    assert tuple(colour_mask(np.array([[255]], dtype=dtype), PALETTE, other=(1, 2, 3))[0, 0]) == (1, 2, 3)


def test_heat_grows_brighter():
    colours = heat(np.linspace(-0.5, 1.5, 41, dtype=np.float32).reshape(1, -1))
    brightness = colours[0] @ np.array([0.299, 0.587, 0.114])
    assert colours.dtype == np.uint8
    assert (np.diff(brightness[10:31]) > 0).all()
    assert (colours[0, :11] == colours[0, 0]).all()
    assert (colours[0, 30:] == colours[0, -1]).all()
    assert (heat(np.array([[np.nan]])) == colours[0, 0]).all()


def test_reliability():
    colours = reliability(np.array([[True, False, True]]))
    assert [tuple(pixel) for pixel in colours[0]] == [RELIABLE, UNRELIABLE, RELIABLE]
    assert colours.dtype == np.uint8


def _picture(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def test_small_images_are_enlarged_into_squares():
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[0, 0] = (255, 0, 0)
    image = np.asarray(panel([{"input": picture}], ["input"]))
    red = (image == (255, 0, 0)).all(-1)
    assert red.sum() == 9
    assert (image == (0, 0, 0)).all(-1).sum() == 192 * 192 - 9


def test_each_picture_is_where_its_row_and_column_meet():
    rows = [
        {"a": _picture(64, 64, (255, 0, 0)), "b": _picture(64, 64, (0, 255, 0))},
        {"b": _picture(32, 64, (0, 0, 255))},
    ]
    image = np.asarray(panel(rows, ["a", "b"]))
    places = [np.argwhere((image == colour).all(-1)) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    (red, green, blue) = (place.min(0) for place in places)
    assert red[0] == green[0]
    assert red[1] + 192 + pictures.GAP == green[1] == blue[1]
    assert green[0] + 192 + pictures.GAP == blue[0]
    assert len(places[2]) == 96 * 192


def test_large_images_are_shrunk():
    image = panel([{"a": _picture(1024, 2048, (0, 0, 255))}], ["a"])
    assert (np.asarray(image) == (0, 0, 255)).all(-1).sum() == 256 * 512


def test_the_legend_is_wrapped_and_complete():
    legend = [(f"class {i}", (i, 255, i)) for i in range(12)]
    without = panel([{"a": _picture(64, 64, (0, 0, 0))}], ["a"])
    image = panel([{"a": _picture(64, 64, (0, 0, 0))}], ["a"], legend)
    assert image.width == without.width
    assert image.height > without.height + 2 * pictures.LINE
    colours = {tuple(colour) for colour in np.asarray(image)[without.height - pictures.MARGIN :].reshape(-1, 3)}
    assert colours >= {colour for _, colour in legend}


def test_titles_are_drawn_and_widen_narrow_columns():
    title = "a title that is wider than its picture"
    image = panel([{title: _picture(192, 10, (0, 0, 0))}], [title])
    assert image.width >= ImageFont.load_default(pictures.FONT_SIZE).getlength(title)
    assert (np.asarray(image)[: pictures.MARGIN + pictures.LINE] < 128).any()
