import pytest
import torch

from pipeline.ops.mixing import classmix_masks, cutmix_masks, mix, partners

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [(64, 64), (513, 513), (33, 57), (57, 33), (5, 4)])
def test_boxes_are_whole_and_cover_half(size):
    height, width = size
    torch.manual_seed(0)
    extremes = torch.tensor([[0.0, 0.0, 0.0], [1 - 2**-24] * 3])
    masks = cutmix_masks(torch.cat([torch.rand(200, 3), extremes]), size)
    rows, columns = masks.any(2).sum(1), masks.any(1).sum(1)
    area = masks.sum((1, 2))
    assert torch.equal(area, rows * columns)  # a filled rectangle, nowhere cut off by the image's edge
    assert ((columns > width / 2) & (columns <= width)).all()
    assert ((area - height * width / 2).abs() <= columns / 2 + 1e-6).all()  # the height is rounded
    assert masks[-1, -1, -1]  # the largest draw touches the last pixel


def test_places_and_widths_differ():
    torch.manual_seed(0)
    masks = cutmix_masks(torch.rand(300, 3), (64, 64))
    assert len(set(masks.any(1).sum(1).tolist())) == 31  # 33..63
    assert masks[:, 0].any()
    assert not masks[:, 0].any(1).all()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_pairs_do_not_depend_on_the_cut(count):
    whole = partners(2 * count, CPU)
    assert torch.equal(whole, torch.cat([partners(count, CPU), partners(count, CPU) + count]))
    assert torch.equal(whole[whole], torch.arange(2 * count))  # they swap


def test_an_odd_batch_shifts_by_one():
    assert partners(3, CPU).tolist() == [1, 2, 0]
    assert partners(1, CPU).tolist() == [0]


def test_mix_takes_the_unmixed_partner_inside_the_mask():
    own = torch.arange(4).view(4, 1, 1).expand(4, 2, 3)
    mask = torch.zeros(4, 2, 3, dtype=torch.bool)
    mask[:, 0] = True
    mixed = mix(own, mask, partners(4, CPU))
    assert mixed[:, 0, 0].tolist() == [1, 0, 3, 2]
    assert mixed[:, 1, 0].tolist() == [0, 1, 2, 3]
    assert torch.equal(mix(own[:, None].expand(4, 3, 2, 3), mask, partners(4, CPU))[:, 1], mixed)


def _slow_classmix(draws: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(label, dtype=torch.bool)
    for b, own in enumerate(label):
        present = [c for c in own.unique().tolist() if c != 255]
        stay = sorted(present, key=lambda c, b=b: float(draws[b, c]))[: len(present) // 2]
        for c in stay:
            mask[b][own == c] = False
    return mask


@pytest.mark.parametrize("classes", [2, 5, 21, 150])
def test_classmix_keeps_a_random_half_of_the_classes_present(classes):
    torch.manual_seed(0)
    for _ in range(5):
        label = torch.randint(0, classes, (4, 6, 7))
        label[1] = label[1] % 3 if classes > 2 else label[1]  # few classes
        label[torch.rand(4, 6, 7) < 0.2] = 255
        draws = torch.rand(4, classes)
        found = classmix_masks(draws, label)
        assert found.dtype == torch.bool
        assert torch.equal(found, _slow_classmix(draws, label))


def test_classmix_replaces_an_image_of_one_class_or_none():
    label = torch.tensor([[[2, 2], [2, 255]], [[255, 255], [255, 255]]])
    assert classmix_masks(torch.rand(2, 5), label).all()


def test_classmix_replaces_unknown_pixels():
    torch.manual_seed(0)
    label = torch.randint(0, 4, (3, 8, 8))
    label[:, :2] = 255
    mask = classmix_masks(torch.rand(3, 4), label)
    assert mask[:, :2].all()
    assert not mask.all()


def test_classmix_chooses_each_class_as_often():
    torch.manual_seed(0)
    label = torch.tensor([0, 1, 2, 3]).view(1, 2, 2).expand(4000, 2, 2)
    kept = (~classmix_masks(torch.rand(4000, 6), label)).flatten(1)
    assert (kept.sum(1) == 2).all()  # classes that are absent are not chosen in their place
    assert (kept.sum(0) - 2000).abs().max() < 160  # 5 standard deviations
