import dataclasses

import numpy as np
import pytest
import torch

from pipeline.datasets.images import decode_mask
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.splits import load_split
from pipeline.errors import UserError
from pipeline.ingest import read
from pipeline.ingest.groups import select_groups
from tests.unit.ingest.loading import STRONG, both_views, configured, same, take


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("start", [0, 7])
def test_strong_views_do_not_depend_on_workers_threads_or_interruptions(shapes, world, start):
    config = configured(shapes)
    whole = take(config, start + 2, spec=STRONG)[start:]
    for rank in range(world):
        part = take(config, 2, spec=STRONG, rank=rank, world=world, start=start, threads=3)
        for one, two in zip(whole, part, strict=True):
            share = 6 // world
            for all_of, mine in zip(both_views(one)[1].strong, both_views(two)[1].strong, strict=True):
                assert torch.equal(mine, all_of[rank * share : (rank + 1) * share])


def test_strong_views_differ_from_the_weak_one_in_colour_alone(shapes):
    for batch in take(configured(shapes, scale=[0.3, 0.8]), 5, spec=STRONG):
        labeled, unlabeled = both_views(batch)
        assert labeled.strong == ()
        one, two = unlabeled.strong
        for view in (one, two):
            assert view.shape == unlabeled.image.shape
            assert view.dtype == torch.uint8
            assert view.is_contiguous()
            padding = ~unlabeled.valid[:, None].expand_as(view)
            assert padding.any()
            assert torch.equal(view[padding], unlabeled.image[padding])
            assert not torch.equal(view, unlabeled.image)
        assert not torch.equal(one, two)


def test_who_asks_for_no_strong_view_gets_the_very_same_batches(shapes):
    config = configured(shapes)
    plain, strong = take(config, 4), take(config, 4, spec=STRONG)
    assert same(plain, strong)
    assert all(both_views(batch)[1].strong == () for batch in plain)


def test_strong_views_move_with_the_batch(shapes):
    unlabeled = both_views(take(configured(shapes), 1, spec=STRONG)[0].to(torch.device("meta")))[1]
    assert [view.device.type for view in unlabeled.strong] == ["meta"] * 2


# ---- damage ---------------------------------------------------------------------------------------------------


def test_pseudo_labels_belong_to_the_pixels_of_their_image(shapes, pseudo_labels):
    """They are the truth here: where the window shows the image, each pixel has the class that its colour says."""
    config = configured(shapes, pseudo_labels=pseudo_labels, scale=[1.0, 1.0])
    masks = {}
    for group in select_groups(open_dataset(shapes), load_split(open_dataset(shapes), "1_4").unlabeled):
        table = read.read_group(shapes, group.shard, group.row_group, ["id", "mask"])
        masks.update(zip(*(table[name].to_pylist() for name in ("id", "mask")), strict=True))
    for batch in take(config, 4, spec=STRONG):
        labeled, unlabeled = both_views(batch)
        assert labeled.pseudo is None
        assert unlabeled.mask is None
        assert unlabeled.pseudo is not None
        assert torch.equal(unlabeled.pseudo == 255, ~unlabeled.valid)
        for name, label in zip(unlabeled.ids, unlabeled.pseudo, strict=True):
            stored = decode_mask(masks[name])
            crops = [
                side[y : y + 40, x : x + 32] for side in (stored, stored[:, ::-1]) for y in range(25) for x in range(33)
            ]
            assert any(np.array_equal(crop, label.numpy()) for crop in crops)


def test_pseudo_labels_change_nothing_else(shapes, pseudo_labels):
    plain, labeled = (
        take(configured(shapes, **data), 4, spec=STRONG) for data in ({}, {"pseudo_labels": pseudo_labels})
    )
    assert same(plain, labeled)


def test_pseudo_labels_of_another_split_are_refused(shapes, pseudo_labels):
    config = dataclasses.replace(configured(shapes, pseudo_labels=pseudo_labels), split="1_8")
    with pytest.raises(UserError, match="no pseudo-label of"):
        take(config, 60)
