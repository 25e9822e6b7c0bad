from typing import cast

import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.methods.fixmatch import Pseudo, cutmixed
from pipeline.methods.unimatch import UniMatch
from pipeline.models import FeatureMaps
from tests.unit.methods.conftest import CPU, batch, full, pseudo_loss, step, train_step


def _trained(build, **options) -> UniMatch:
    method = cast("UniMatch", build("unimatch", **options))
    for index in range(3):
        train_step(method, index)
    return method


def _dropped(feature_map: Tensor, draws: Tensor, p: float) -> Tensor:
    """Channel by channel."""
    out = torch.zeros_like(feature_map)
    for b, c in (draws >= p).nonzero().tolist():
        out[b, c] = feature_map[b, c] / (1 - p)
    return out


def test_the_three_losses_pixel_by_pixel(build):
    method = _trained(build, threshold=0.45, cutmix=1.0, dropout=0.3, lambda_s=0.8, lambda_fp=0.6)
    on = batch(4, seed=3)
    unlabeled = method.sides(on)[1]
    unlabeled.valid[1, :, 3:9] = False
    found = method(on, step(3))
    with torch.no_grad():
        maps = method.student.encode(torch.cat([on.labeled.image, unlabeled.image]))
        dropped = [
            _dropped(feature_map[4:], step(3).uniform_per_image(f"drop/{name}", (4, feature_map.shape[1]), CPU), 0.3)
            for name, feature_map in zip(("low", "mid", "high"), maps.levels, strict=True)
        ]
        both = full(method.student.decoder(FeatureMaps(*map(torch.cat, zip(maps.levels, dropped, strict=True)))).logits)
        weak, perturbed = both[4:8].softmax(1), both[8:]
        number = torch.arange(weak[:, 0].numel()).view(weak[:, 0].shape)
        one, two = (
            cutmixed(Pseudo(view, number, unlabeled.valid), step(3), f"cutmix/{k}", 1.0)
            for k, view in enumerate(unlabeled.strong)
        )
        strong = full(method.student(torch.cat([one.image, two.image])).logits)
    losses = [
        pseudo_loss(logits, weak, source, unlabeled.valid, 0.45)[0]
        for logits, source in ((strong[:4], one.label), (strong[4:], two.label), (perturbed, number))
    ]
    assert float(found.terms["strong"].detach()) == pytest.approx(0.8 * (losses[0] + losses[1]) / 2 / 2, rel=1e-4)
    assert float(found.terms["features"].detach()) == pytest.approx(0.6 * losses[2] / 2, rel=1e-4)
    assert 0 < float(found.logs["kept"]) < 1
    assert not torch.equal(one.label, two.label)


def test_the_defaults_are_the_releases_sum(build):
    """(L_s + .25 L_s1 + .25 L_s2 + .5 L_fp) / 2."""
    options = cast("UniMatch", build("unimatch")).options
    assert options.lambda_s / 4 == 0.25 / 2
    assert options.lambda_fp / 2 == 0.5 / 2


def test_without_dropout_the_third_stream_is_the_weak_view(build):
    method, on = _trained(build, dropout=0.0), batch(4, seed=3)
    _, weak, perturbed = method.weak(on.labeled.image, method.sides(on)[1].image, step(3))
    torch.testing.assert_close(weak, perturbed)


def test_dropping_everything_is_refused(build):
    with pytest.raises(UserError, match=r"unimatch\.dropout 1: must be below 1"):
        build("unimatch", dropout=1.0)


def test_labels_carry_no_gradient(build):
    """With fresh labels of the weak view, both unlabeled losses leave the weak logits alone."""
    method, on = _trained(build, threshold=0.0), batch(4, seed=3)
    outputs: list[Tensor] = []
    method.student.decoder.register_forward_hook(lambda _, __, out: outputs.append(out.logits))
    terms = method(on, step(3)).terms
    both, strong = outputs
    (of_strong,) = torch.autograd.grad(terms["strong"], strong, retain_graph=True)
    (of_features,) = torch.autograd.grad(terms["features"], both, retain_graph=True)
    assert torch.autograd.grad(terms["strong"], both, allow_unused=True)[0] is None
    assert of_strong.any()
    assert of_features[8:].any()
    assert not of_features[:8].any()
