"""Who is anchor, positive, negative and prototype, against the equations written out pixel by pixel."""

import pytest
import torch
from torch import Tensor

from pipeline.methods.u2pl import reference
from pipeline.methods.u2pl.fast import candidates, kth_largest, negative_mask, positives
from pipeline.methods.u2pl.reference import Candidates, Positives, Rule, averaged
from pipeline.ops.selection import Members, rows
from pipeline.ops.world import World
from tests.unit.methods.u2pl.scenes import C, D, H, W, drawn, draws_of, scene
from tests.unit.ops.worlds import on_ranks

RULES = [Rule(0.3, *ranks) for ranks in [(1, 2), (2, 4), (3, 20), (1, 5), (4, 5)]]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("labels", [None, (0, 1, 3), (2,)])
def test_candidates_are_those_of_the_equations(rule, labels):
    pixels = scene(labels=labels)
    sets, draws = reference.sets(pixels, rule), draws_of()
    found = candidates(pixels, rule, draws)
    teacher = rows(pixels.teacher).double()
    assert torch.equal(found.anchor_count, sets.anchor.sum(1))
    assert torch.equal(found.positive_count, sets.positive.sum(1))
    assert torch.equal(found.negative_count, sets.negative.sum(1))
    keys, valid = Members(sets.negative).stratified(draws.keys)
    assert torch.equal(found.keys_valid, valid)
    assert ((found.anchors >= 0) & (found.anchors < 3 * H * W)).all()
    for c in range(C):
        assert torch.equal(found.keys[c][valid[c]], keys[c][valid[c]])
        torch.testing.assert_close(
            found.positive_sum[c].double(), teacher[sets.positive[c]].sum(0), rtol=1e-5, atol=1e-5
        )
        if sets.anchor[c].any():
            assert found.anchors[c].tolist() == drawn(sets.anchor[c], draws.anchors[c])
    assert sets.anchor.any()
    assert sets.negative.any()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_negative_mask_is_that_of_the_equations(rule):
    pixels = scene(seed=1)
    found = negative_mask(pixels, rule)
    assert found.dtype == torch.uint8
    assert torch.equal(found.bool(), reference.sets(pixels, rule).negative)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_labels_may_have_any_type(dtype):
    pixels, rule, draws = scene(), RULES[1], draws_of()
    other = candidates(pixels._replace(label=pixels.label.to(dtype)), rule, draws)
    for one, two in zip(candidates(pixels, rule, draws), other, strict=True):
        assert torch.equal(one, two)


def test_teacher_maps_may_be_half_precision_and_in_channels_last_layout():
    pixels, rule, draws = scene(), RULES[1], draws_of()
    low = pixels._replace(logits=pixels.logits.bfloat16(), teacher=pixels.teacher.bfloat16())
    high = pixels._replace(logits=low.logits.float(), teacher=low.teacher.float())
    low = low._replace(teacher=low.teacher.to(memory_format=torch.channels_last))
    for one, two in zip(candidates(low, rule, draws), candidates(high, rule, draws), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=5e-2)
    assert candidates(low, rule, draws).positive_sum.dtype == torch.float32


@pytest.mark.parametrize("labeled", [0, 1, 3])
def test_how_many_images_are_labeled(labeled):
    pixels = scene()._replace(labeled=labeled)
    assert torch.equal(negative_mask(pixels, RULES[1]).bool(), reference.sets(pixels, RULES[1]).negative)


def test_no_labeled_pixel_is_negative_and_anchor_of_one_class():
    pixels, rule = scene(), Rule(0.0, 2, 5)
    negative = negative_mask(pixels, rule).view(C, 3, H, W)[:, 0].bool()
    own = pixels.label[0] == torch.arange(C).view(-1, 1, 1)
    assert not (negative & own).any()
    assert negative.any()


def test_ignored_pixels_are_in_no_set():
    """Even if the caller calls them reliable."""
    pixels, draws = scene(), draws_of(anchors=200, keys=200)
    ignored = (pixels.label == 255).flatten()
    may_be_anchor = pixels.may_be_anchor | (pixels.label == 255)
    found = candidates(pixels._replace(may_be_anchor=may_be_anchor), RULES[2], draws)
    assert torch.equal(found.positive_count, candidates(pixels, RULES[2], draws).positive_count)
    assert not ignored[found.keys[found.keys_valid]].any()
    assert not ignored[found.anchors[found.anchor_count > 0]].any()


def test_a_pixel_without_a_probability_is_no_anchor():
    pixels = scene(labels=(1,))
    found = candidates(pixels._replace(logits=torch.full((3, C, H, W), torch.nan)), RULES[1], draws_of())
    assert not found.anchor_count.any()


@pytest.mark.parametrize("classes", [*range(1, 22), 60, 150])
def test_kth_largest_is_that_of_a_sort(classes):
    """Both ways of finding it: up to 21 classes and at the ends of many, by insertion; else by `topk`."""
    torch.manual_seed(classes)
    ranks = range(1, classes + 1) if classes < 60 else (1, 3, 4, 8, 9, classes // 2, classes - 20, classes - 3, classes)
    for values in (torch.randn(2, classes, 3, 4), torch.randint(0, 4, (2, classes, 3, 4)).float()):
        ordered_values = values.sort(1, descending=True).values
        for k in ranks:
            assert torch.equal(kth_largest(values, k), ordered_values[:, k - 1])


def test_classes_of_equal_scores_have_equal_ranks():
    """Three classes lead together: none is outranked by another, so all of them are likely for r_l = 1."""
    pixels = scene()
    logits = torch.tensor([2.0, 2.0, 2.0, 1.0, 0.0]).view(1, C, 1, 1).expand(3, -1, H, W)
    for rule in RULES:
        tied = pixels._replace(logits=logits)
        assert torch.equal(negative_mask(tied, rule).bool(), reference.sets(tied, rule).negative)


# ---- prototypes over ranks --------------------------------------------------------------------------------------


def _found(counts: list[int], anchors: list[int], sums: Tensor) -> Candidates:
    """What a rank found, as far as prototypes and weights go."""
    nothing = torch.zeros(len(counts), 0, dtype=torch.long)
    count, anchor = torch.tensor(counts), torch.tensor(anchors)
    return Candidates(nothing, anchor, sums, count, nothing, nothing.bool(), anchor)


def test_prototypes_are_the_means_over_all_ranks():
    rule, draws = RULES[1], draws_of()
    scenes = [scene(seed=0, labels=(0, 1, 3)), scene(seed=1, labels=(1, 2))]
    results = on_ranks(2, lambda w: positives(candidates(scenes[w.rank], rule, draws), w))
    sets = [reference.sets(pixels, rule).positive for pixels in scenes]
    features = [rows(pixels.teacher) for pixels in scenes]
    for found in results:
        for c in range(C):
            members = torch.cat([f[s[c]] for f, s in zip(features, sets, strict=True)])
            assert found.pixels[c] == len(members)
            expected = members.mean(0) if len(members) else torch.zeros(D)
            torch.testing.assert_close(found.mean[c], expected, rtol=1e-5, atol=1e-6)
    assert results[0].pixels[4] == 0
    assert not results[0].mean[4].any()


def test_alone_a_class_with_anchors_weighs_1():
    found = positives(_found([5, 5, 0, 3], [2, 0, 0, 3], torch.zeros(4, D)), World())
    assert found.weight.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_mean_over_ranks_expects_what_one_draw_from_all_does(ranks):
    """Each rank's mean over its own candidates, times its weight."""
    torch.manual_seed(0)
    counts = torch.tensor([[4, 0, 1, 0], [1, 3, 0, 0], [7, 5, 0, 0]])[:ranks]
    values = [[torch.rand(int(n)) for n in own] for own in counts]
    weights = [
        p.weight
        for p in on_ranks(ranks, lambda w: positives(_found([9] * 4, counts[w.rank].tolist(), torch.zeros(4, D)), w))
    ]
    for c in range(4):
        everything = torch.cat([own[c] for own in values])
        mean = sum(weights[r][c] * own[c].mean() for r, own in enumerate(values) if len(own[c])) / ranks
        torch.testing.assert_close(
            torch.as_tensor(mean, dtype=torch.float32), everything.mean() if len(everything) else torch.tensor(0.0)
        )
        assert all(weights[r][c] == 0 for r in range(ranks) if counts[r, c] == 0)


def test_averaged_moves_only_the_classes_that_are_present():
    previous, mean = torch.randn(3, D), torch.randn(3, D)
    current = Positives(mean, torch.tensor([4.0, 0.0, 1.0]), torch.zeros(3))
    found = averaged(previous, current, torch.tensor(0.75))
    torch.testing.assert_close(found[[0, 2]], 0.75 * previous[[0, 2]] + 0.25 * mean[[0, 2]])
    assert torch.equal(found[1], previous[1])
    assert torch.equal(averaged(previous, current, torch.tensor(0.0))[[0, 2]], mean[[0, 2]])
