import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.datasets.images import encode_png
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.ingest import read
from pipeline.ingest.order import Unit
from pipeline.ingest.read import Reader, read_inline
from pipeline.storage import Patience
from tests.unit.ingest.loading import DAMAGED, STRONG, both_views, configured, equal, loader_of, take


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
def test_a_damaged_labeled_sample_has_no_label(shapes, monkeypatch, what):
    original = read.read_group
    first = take(configured(shapes), 1)[0].labeled.ids[0]

    small = encode_png(np.zeros((5, 5), np.uint8))

    def spoiled(*arguments: Any) -> pa.Table:
        rows = original(*arguments).to_pylist()
        for row in rows:
            if row["id"] == first and "mask" in row:
                worse = {"image": {"image": DAMAGED}, "mask": {"mask": row["mask"][:60]}, "size": {"mask": small}}
                row.update(worse[what])
        return pa.Table.from_pylist(rows)

    monkeypatch.setattr(read, "read_group", spoiled)
    labeled = take(configured(shapes), 1)[0].labeled
    assert labeled.mask is not None
    assert (labeled.mask[0] == 255).all()
    assert not labeled.valid[0].any()
    assert labeled.valid[1:].any()


def test_too_many_damaged_samples_end_the_run(shapes):
    config = configured(shapes)
    everything = set(open_dataset(shapes).index["id"].to_pylist())
    loader = loader_of(config, reader=_spoiling(everything))
    with pytest.raises(UserError, match=r"11 of \d+ samples are damaged, the last one shape_\d+ \(not a JPEG"):
        list(itertools.islice(loader, 20))
    loader.close()


def test_removed_images_are_skipped(shapes, caplog):
    """A pool may lose an image after it was listed: its bytes are empty then."""

    def read(units: Iterable[Unit], labels: str | None, patience: Patience) -> Iterator[tuple[Unit, pa.Table]]:
        for unit, table in read_inline(units, labels, patience):
            rows = [{**row, "image": b""} for row in table.to_pylist()[:1]] + table.to_pylist()[1:]
            yield unit, pa.Table.from_pylist(rows, table.schema)

    with caplog.at_level(logging.WARNING, "pipeline"):
        loader = loader_of(configured(shapes), reader=read)
        batches = list(itertools.islice(loader, 3))
        loader.close()
    gone = [not valid.any() for batch in batches for valid in both_views(batch)[1].valid]
    assert loader.stats.skipped == sum(gone) > 0
    assert "no bytes" in caplog.text


# ---- looking ahead --------------------------------------------------------------------------------------------
