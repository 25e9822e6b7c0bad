"""Transforms of the user's own; the example of `docs/adding-a-transform.md`, as a reader would use it."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.ingest import transform
from pipeline.ingest.order import generator
from tests.unit.ingest.loading import STRONG, both_views, configured, same, take

PAGE = (Path(__file__).parents[3] / "docs" / "adding-a-transform.md").read_text()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of the page in the working directory."""
    found = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert found
    (tmp_path / "my_views.py").write_text(found[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_views", None)
    transform.load.cache_clear()


def test_the_example_turns_image_masks_and_padding_alike(shapes, module):
    plain = take(configured(shapes, scale=[0.3, 0.6]), 6, spec=STRONG)
    turned = take(configured(shapes, scale=[0.3, 0.6], transform="my_views.turned"), 6, spec=STRONG)
    from my_views import turned as by_hand  # pyright: ignore[reportMissingImports]

    for before, after in zip(plain, turned, strict=True):
        for old, new in zip(both_views(before), both_views(after), strict=True):
            assert old.ids == new.ids
            for row, name in enumerate(old.ids):
                rng = generator(0, 0, name, "transform")
                masks = [] if old.mask is None else [old.mask[row].numpy().astype(np.uint8)]
                shown = np.where(old.valid[row], 0, 255).astype(np.uint8)
                image, changed = by_hand(old.image[row].permute(1, 2, 0).contiguous().numpy(), [*masks, shown], rng)
                assert (new.image[row].permute(1, 2, 0).numpy() == image).all()
                valid = new.valid[row].numpy()
                assert (valid == (changed[-1] != 255)).all()
                if new.mask is not None:
                    assert (new.mask[row].numpy() == np.where(valid, changed[0], 255)).all()


def test_the_sequence_is_one_for_any_start(shapes, module):
    config = configured(shapes, transform="my_views.turned")
    batches = take(config, 9)
    assert same(batches[5:], take(config, 4, start=5))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return image[:4], masks", r"image: uint8 \[4, 32, 3\] instead of an array of uint8 \[40, 32, 3\]"),
        ("return image / 2, masks", r"image: float64 \[40, 32, 3\] instead of an array of uint8"),
        ("return image, masks[1:]", "masks: 1 instead of 2"),
        ("return image, [mask.tolist() for mask in masks]", "masks: list instead of an array"),
        ("return image", "ValueError: too many values to unpack"),
        ("return image, masks, rng", "ValueError: too many values to unpack"),
        ("return {}[image.shape], masks", r"KeyError: \(40, 32, 3\), .*my_views.py:2"),
        ("return None", "TypeError: cannot unpack"),
    ],
)
def test_a_transform_that_fails_is_told_in_one_line(module, body, message):
    (module / "my_views.py").write_text(f"def turned(image, masks, rng):\n    {body}\n")
    with pytest.raises(UserError, match=rf"^data.transform my_views.turned: .*{message}.*\(image of a trial call\)$"):
        transform.check("my_views.turned", (40, 32))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_views.other", "AttributeError: .*has no attribute 'other'"),
        ("nowhere.turned", "ModuleNotFoundError: No module named 'nowhere'"),
        ("turned", "ValueError: Empty module name; expected package.module.function"),
        ("my_views.GREY", "is no function"),
    ],
)
def test_a_transform_that_is_not_there(module, path, message):
    with pytest.raises(UserError, match=rf"^data.transform {path}: .*{message}"):
        transform.load(path)


def test_a_transform_that_fails_later_ends_the_stream(shapes, module):
    body = "return image, [mask[1:] for mask in masks]"
    (module / "my_views.py").write_text(f"def turned(image, masks, rng):\n    {body}\n")
    with pytest.raises(UserError, match=r"data.transform my_views.turned: .*\(image \w+\)$"):
        take(configured(shapes, transform="my_views.turned"), 1)
