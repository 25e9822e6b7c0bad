import math
from typing import cast

import pytest
import torch

from pipeline.config.options import CCTOptions
from pipeline.errors import UserError
from pipeline.methods.cct import CCT
from pipeline.models import upsample
from pipeline.models.parts import subpixel_decoder
from tests.unit.methods.conftest import CLASSES, batch, step

KINDS = CCTOptions.kinds
NONE = dict.fromkeys(KINDS, 0)


def _cct(build, **options) -> CCT:
    return cast("CCT", build("cct", **options))


def test_consistency_is_the_mean_over_decoders_and_valid_pixels(build):
    """Equation 2, pixel by pixel, with decoders that miss the most active cells."""
    method, on = _cct(build, **NONE | {"feature_drop": 2}), batch()
    found = method(on, step(10)).terms["consistency"]
    assert on.unlabeled is not None
    maps = method.student.encode(on.unlabeled.image)
    target = method.student.decode(maps).logits.softmax(1)
    size = (target.shape[2], target.shape[3])
    errors = []
    for number, head in enumerate(method.auxiliary):
        u = step(10).uniform_shared(f"cct/{number}", (1,), torch.device("cpu"))
        for b in range(2):
            activity = maps.high[b].mean(0)
            kept = maps.high[b] * (activity < activity.max() * (0.7 + 0.2 * u))
            p = upsample(head(kept[None]), size).softmax(1)[0]
            for y in range(size[0]):
                for x in range(size[1]):
                    if on.unlabeled.valid[b, y * 24 // size[0], x * 24 // size[1]]:
                        errors.append(((p[:, y, x] - target[b, :, y, x]) ** 2).mean())
    torch.testing.assert_close(found, 30 * torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)


def test_the_weight_rises_over_the_first_tenth_of_the_run(build):
    values = [_cct(build)(batch(), step(index)).terms["consistency"].item() for index in (0, 1, 2, 19)]
    draws_apart = 0.5  # other draws in each step
    assert values[0] == pytest.approx(values[2] * math.exp(-5), rel=draws_apart)
    assert values[1] == pytest.approx(values[2] * math.exp(-1.25), rel=draws_apart)
    assert values[3] == pytest.approx(values[2], rel=draws_apart)


@pytest.mark.parametrize("kind", KINDS)
def test_each_perturbation_alone_trains_encoder_and_decoder_but_not_the_main_one(kind, build):
    method = _cct(build, **NONE | {kind: 1})
    losses = method(batch(), step(10))
    losses.terms["consistency"].backward()
    assert losses.logs["disagreement"].shape == (1,)
    assert any(p.grad is not None and p.grad.any() for p in method.auxiliary.parameters())
    assert any(p.grad is not None and p.grad.any() for p in method.student.encoder_parameters())
    assert not any(p.grad is not None and p.grad.any() for p in method.student.head_parameters())


@pytest.mark.parametrize("background", [0, 3])
def test_context_and_object_masks_complement_each_other(build, background):
    method = _cct(build, data={"background": str(background)})
    features, label = torch.rand(2, 4, 3, 3), torch.randint(0, CLASSES, (2, 3, 3))
    foreground = method.foreground(2, step(0), features.device)
    context, objects = (
        method.perturb(kind, features, label, foreground, torch.nn.Identity(), lambda *_: features)
        for kind in ("context", "objects")
    )
    assert torch.equal(context, features * (label != background).unsqueeze(1))
    assert torch.equal(context + objects, features)


def test_without_a_background_class_objects_are_drawn(build):
    method = _cct(build, data={"background": "none"})
    drawn = method.foreground(200, step(0), torch.device("cpu"))
    assert drawn.shape == (200, CLASSES)
    assert 0.4 < float(drawn.float().mean()) < 0.6


def test_subpixels_start_equal():
    decoder = subpixel_decoder(6, 3, 1)
    with torch.no_grad():
        decoder[1].bias.zero_()  # type: ignore[union-attr]
        out = decoder(torch.randn(1, 6, 4, 5))
    assert out.shape == (1, 3, 8, 10)
    assert torch.equal(out[..., ::2, ::2], out[..., 1::2, 1::2])


def test_options_count_decoders_and_need_one(build):
    assert _cct(build).kinds == list(KINDS)
    assert len(_cct(build, dropout=3, cutout=0).auxiliary) == 8
    with pytest.raises(UserError, match="needs an auxiliary decoder"):
        _cct(build, **NONE)
