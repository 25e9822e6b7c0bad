from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from pipeline.methods.base import Step
from pipeline.methods.fixmatch import Pseudo, cutmixed
from pipeline.methods.unimatch_v2 import UniMatchV2
from pipeline.models import FeatureMaps
from pipeline.ops.world import World
from tests.unit.methods.conftest import CPU, TOTAL, batch, full, pseudo_loss, step, train_step

VIT = {"backbone": "vit_tiny"}


def _trained(build, **options) -> UniMatchV2:
    method = cast("UniMatchV2", build("unimatch_v2", **options))
    for index in range(3):
        train_step(method, index)
    return method


def _parted(maps: list[Tensor], share: float) -> list[Tensor]:
    """Image by image, channel by channel; `maps` are of 4 images' first views and then of their second ones."""
    order = step(3).uniform_shared("parted", (4,), CPU).tolist()
    chosen = [index for index in range(4) if sorted(order).index(order[index]) < share * 4]
    found = []
    for each in maps:
        draws, out = step(3).uniform_per_image(f"channels/{each.shape[1]}", (4, each.shape[1]), CPU), each.clone()
        for image in chosen:
            for channel in range(each.shape[1]):
                first = bool(draws[image, channel] < 0.5)
                out[image, channel] *= 2 if first else 0
                out[4 + image, channel] *= 0 if first else 2
        found.append(out)
    return found


@pytest.mark.parametrize("model", [{}, VIT])
def test_the_loss_pixel_by_pixel(model, build):
    method = _trained(build, model=model, cutmix=1.0, dropout=0.5, lambda_u=0.8)
    on = batch(4, seed=3)
    unlabeled = method.sides(on)[1]
    unlabeled.valid[1, :, 3:9] = False
    with torch.no_grad():
        weak = full(method.teacher.eval()(unlabeled.image).logits).softmax(1)
    threshold = float(weak.amax(1).median())
    method.options = replace(method.options, threshold=threshold)
    found = method(on, step(3))
    with torch.no_grad():
        number = torch.arange(weak[:, 0].numel()).view(weak[:, 0].shape)
        one, two = (
            cutmixed(Pseudo(view, number, unlabeled.valid), step(3), f"cutmix/{k}", 1.0)
            for k, view in enumerate(unlabeled.strong)
        )
        maps = method.student.encode(torch.cat([one.image, two.image]))
        dropped = FeatureMaps(*_parted([each for each in maps if each is not None], 0.5))
        strong = full(method.student.decode(dropped).logits)
    losses = [
        pseudo_loss(logits, weak, source, unlabeled.valid, threshold)[0]
        for logits, source in ((strong[:4], one.label), (strong[4:], two.label))
    ]
    assert float(found.terms["strong"].detach()) == pytest.approx(0.8 * sum(losses) / 4, rel=1e-4)
    assert 0.2 < float(found.logs["kept"]) < 0.8
    assert not torch.equal(one.label, two.label)


def test_the_two_views_share_out_the_channels(build):
    method = _trained(build, model=VIT, dropout=1.0)
    maps = FeatureMaps(*(torch.ones(8, 96, 3, 3) for _ in range(4)))
    with torch.no_grad():
        first, second = method.parted(maps, step(1)).low.chunk(2)
        assert all(torch.equal(each, method.parted(maps, step(1)).low) for each in method.parted(maps, step(1)).levels)
    assert torch.equal(first + second, torch.full_like(first, 2.0))
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(first[0], first[1]), "each image has its own draw"
    assert 0.4 < float((first[:, :, 0, 0] > 0).float().mean()) < 0.6


@pytest.mark.parametrize(("share", "parted"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_a_share_of_the_images_is_treated_so(share, parted, build):
    method = _trained(build, dropout=share)
    maps = method.parted(FeatureMaps(*(torch.ones(8, 16, 2, 2) for _ in range(3))), step(1))
    assert int((maps.high[:4] != 1).flatten(1).any(1).sum()) == parted


def test_two_workers_part_the_same_channels(build):
    method = _trained(build)
    whole = method.parted(FeatureMaps(*(torch.ones(8, 16, 2, 2) for _ in range(3))), step(1)).high
    for rank in range(2):
        of = Step(1, TOTAL, seed=0, world=World(rank, 2))
        part = method.parted(FeatureMaps(*(torch.ones(4, 16, 2, 2) for _ in range(3))), of).high
        own = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(part, torch.cat([whole[:4][own], whole[4:][own]]))


def test_the_defaults_are_the_releases_sum(build):
    """(L_s + (L_s1 + L_s2) / 2) / 2, confidence from 0.95, half of the images parted, and a teacher of decay 0.996."""
    method = cast("UniMatchV2", build("unimatch_v2"))
    options = method.options
    assert (options.lambda_u, options.threshold, options.dropout, options.cutmix) == (1.0, 0.95, 0.5, 0.5)
    assert [method.decay(Step(index, 9999, 0, World())) for index in (0, 1, 9, 5000)] == [0.0, 0.5, 0.9, 0.996]


def test_the_teacher_labels_without_dropout_and_learns_nothing(build):
    method, on = _trained(build, threshold=0.0), batch(4, seed=3)
    before = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    torch.stack(list(method(on, step(3)).terms.values())).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in method.teacher.state_dict().items())
    assert all(each.grad is None for each in method.teacher.parameters())
