import itertools
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.batch import Batch
from pipeline.datasets.images import encode_png
from pipeline.datasets.pools import make
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.ingest.loader import Loader
from pipeline.ingest.order import Unit
from pipeline.ingest.read import Reader, read_inline
from pipeline.patience import Patience
from tests.unit.ingest.loading import DAMAGED, STRONG, both_views, configured, equal, loader_of, on_unlabeled, take


def _spoiling(ids: set[str]) -> Reader:
    """The inline reader, with the images of `ids` damaged."""

    def read(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
        for unit, table in read_inline(units, labels, patience):
            rows = [{**row, "image": DAMAGED} if row["id"] in ids else row for row in table.to_pylist()]
            yield unit, pa.Table.from_pylist(rows, table.schema)

    return read


def test_a_damaged_image_counts_as_padding_and_is_named(shapes, caplog):
    config = configured(shapes)
    ids = [name for batch in take(config, 5) for name in both_views(batch)[1].ids]
    with caplog.at_level(logging.WARNING, "pipeline"):
        loader = loader_of(config, reader=_spoiling({ids[3]}), spec=STRONG)
        batches = list(itertools.islice(loader, 5))
        loader.close()
    clean = take(config, 5)
    for one, two in zip(batches, clean, strict=True):
        assert equal(one.labeled, two.labeled)
        mine, other = both_views(one)[1], both_views(two)[1]
        for place, name in enumerate(mine.ids):
            if name == ids[3]:
                assert not mine.valid[place].any()
                assert all(torch.equal(view[place], mine.image[place]) for view in mine.strong)
                assert torch.equal(mine.image[place].flatten(1).unique(dim=1).flatten().sort().values,
                                   torch.tensor([104, 116, 124], dtype=torch.uint8))  # fmt: skip
            else:
                assert torch.equal(mine.image[place], other.image[place])
    assert loader.stats.skipped >= 1
    assert f"sample {ids[3]} is damaged and left out: not a JPEG" in caplog.text


@pytest.mark.parametrize("what", ["image", "mask", "size"])
def test_a_damaged_labeled_sample_has_no_label(shapes, what):
    first = take(configured(shapes), 1)[0].labeled.ids[0]

    small = encode_png(np.zeros((5, 5), np.uint8))

    def spoiled(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
        for unit, table in read_inline(units, labels, patience):
            rows = table.to_pylist()
            for row in rows:
                if row["id"] == first and "mask" in row:
                    worse = {"image": {"image": DAMAGED}, "mask": {"mask": row["mask"][:60]}, "size": {"mask": small}}
                    row.update(worse[what])
            yield unit, pa.Table.from_pylist(rows, table.schema)

    labeled = take(configured(shapes), 1, reader=spoiled)[0].labeled
    assert labeled.mask is not None
    assert (labeled.mask[0] == 255).all()
    assert not labeled.valid[0].any()
    assert labeled.valid[1:].any()


def test_too_many_damaged_samples_end_the_run(shapes):
    config = configured(shapes)
    everything = set(open_dataset(shapes).index["id"].to_pylist())
    loader = loader_of(config, reader=_spoiling(everything))
    what = r"11 of \d+ images of \S+ are damaged, the last one shape_\d+ \(not a JPEG.*\); prepare it again with"
    with pytest.raises(UserError, match=what):
        list(itertools.islice(loader, 20))
    loader.close()


def test_removed_images_are_skipped(shapes, caplog):
    """A pool may lose an image after it was listed: its bytes are empty then."""

    def read(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
        for unit, table in read_inline(units, labels, patience):
            rows = [{**row, "image": b""} for row in table.to_pylist()[:1]] + table.to_pylist()[1:]
            yield unit, pa.Table.from_pylist(rows, table.schema)

    with caplog.at_level(logging.WARNING, "pipeline"):
        loader = loader_of(configured(shapes), reader=on_unlabeled(read))
        batches = list(itertools.islice(loader, 3))
        loader.close()
    gone = [not valid.any() for batch in batches for valid in both_views(batch)[1].valid]
    assert loader.stats.skipped == sum(gone) > 0
    assert "no bytes" in caplog.text


# ---- pools ----------------------------------------------------------------------------------------------------


def _pool(root: Path, good: int, bad: int, **options: Any) -> str:
    """A pool of images of which the first `good` are some."""
    for number in range(good + bad):
        data = encode_png(np.full((40, 48, 3), number, np.uint8)) if number < good else DAMAGED
        (root / "photos").mkdir(parents=True, exist_ok=True)
        (root / "photos" / f"{number:03d}.png").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make.tasks, "run", lambda task, items, *_: map(task, items))
        make.make_pool("images", str(root / "photos"), str(root / "pool"), **options)
    return str(root / "pool")


def _loaded(shapes: str, pool: str, steps: int) -> tuple[Loader, list[Batch]]:
    """The batches of a run whose unlabeled images are all of the pool."""
    loader = loader_of(configured(shapes, unlabeled_pools=[pool], pool_weights=[0, 1]))
    try:
        return loader, list(itertools.islice(loader, steps))
    finally:
        loader.close()


def test_what_prepare_left_out_is_no_damage(shapes, tmp_path, caplog):
    pool = _pool(tmp_path, 12, 2, copy=True, skip_bad=True)
    with caplog.at_level(logging.WARNING, "pipeline"):
        loader, batches = _loaded(shapes, pool, 60)
    blank = [name for batch in batches for name, valid in zip(both_views(batch)[1].ids, both_views(batch)[1].valid,
             strict=True) if not valid.any()]  # fmt: skip
    assert set(blank) == {"012.png", "013.png"}
    assert len(blank) > 20
    assert loader.stats.skipped == 0
    assert not caplog.text


def test_a_damaged_image_is_one_in_all_epochs(shapes, tmp_path, caplog):
    """Links are not looked into by prepare."""
    pool = _pool(tmp_path, 12, 2)
    (tmp_path / "photos/000.png").unlink()
    with caplog.at_level(logging.WARNING, "pipeline"):
        loader, _ = _loaded(shapes, pool, 60)
    assert loader.stats.skipped == 3
    assert sorted(record.getMessage()[7:14] for record in caplog.records) == ["000.png", "012.png", "013.png"]


@pytest.mark.parametrize("vanish", [False, True])
def test_too_much_damage_behind_links_ends_the_run(shapes, tmp_path, vanish):
    """Even if it comes after many epochs, and although the labeled images are whole."""
    pool = _pool(tmp_path, 30, 0)
    loader = loader_of(configured(shapes, unlabeled_pools=[pool], pool_weights=[0, 1]))
    batches = iter(loader)
    list(itertools.islice(batches, 100))
    for number in range(11):
        file = tmp_path / f"photos/{number:03d}.png"
        file.unlink() if vanish else file.write_bytes(DAMAGED)
    what = rf"11 of 30 images of {pool} are damaged, the last one 0\d\d\.png .*; mend or restore the files below"
    with pytest.raises(UserError, match=rf"{what} {tmp_path}/photos .*--copy --overwrite --skip_bad.*--fresh"):
        list(itertools.islice(batches, 100))
    loader.close()


def test_a_pool_without_any_image_left_ends_the_run(shapes, tmp_path):
    """Ten damaged images are tolerated, but not where there are no others."""
    pool = _pool(tmp_path, 8, 0)
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(UserError, match=rf"8 of 8 images of {pool} are damaged"):
        _loaded(shapes, pool, 20)


# ---- looking ahead --------------------------------------------------------------------------------------------
