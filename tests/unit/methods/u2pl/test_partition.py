"""What U2PL and U2PL on AEL tell people of pixels is what their losses do with them."""

from typing import cast

import numpy as np
import pytest
import torch

from pipeline.methods.u2pl import reference
from pipeline.methods.u2pl.reference import Pixels, Reliability, Rule
from pipeline.methods.u2pl.u2pl import U2PL
from pipeline.methods.u2pl.with_ael import U2PLAEL
from pipeline.ops.world import World
from tests.unit.methods.conftest import CLASSES, step

AT = step(5)
ALPHA = 0.2 * (1 - 5 / 20)


def _logits() -> torch.Tensor:
    """Of two images at the resolution of the labels, float [2,C,12,12]."""
    return 2 * torch.randn(2, CLASSES, 12, 12, generator=torch.Generator().manual_seed(0))


def _flat(logits: torch.Tensor) -> torch.Tensor:
    return logits.transpose(0, 1).flatten(1).T


def _negatives(logits: torch.Tensor, may_be_negative: torch.Tensor, r_l: int, r_h: int) -> torch.Tensor:
    """The negatives of training, bool [n,C]: all images unlabeled."""
    nowhere = torch.zeros_like(may_be_negative)
    label, features = logits.argmax(1), logits[:, :1]
    pixels = Pixels(features, features, logits, label, nowhere, may_be_negative, labeled=0)
    return reference.sets(pixels, Rule(0.3, r_l, r_h)).negative.T


def _split(logits: torch.Tensor) -> Reliability:
    label, shown = logits.argmax(1), torch.ones(2, 12, 12, dtype=torch.bool)
    shares = torch.tensor([1 - ALPHA, ALPHA])
    return reference.unsupervised(logits, logits, label, shown, shares, World(), World())


@pytest.mark.parametrize("kind", ["unreliable", "reliable", "all"])
@pytest.mark.parametrize(("r_l", "r_h"), [(1, 3), (2, 4), (3, 20)])
def test_u2pl_parts_pixels_as_its_losses_do(build, kind, r_l, r_h):
    method, logits = cast("U2PL", build("u2pl", negative_pixels=kind, r_l=r_l, r_h=r_h)), _logits()
    found, split = method.partition(_flat(logits), AT), _split(logits)
    assert found.reliable.equal(split.reliable.flatten())
    may_be_negative = {"unreliable": split.unreliable, "reliable": split.surest, "all": split.known}[kind]
    assert found.negative is not None
    assert found.negative.equal(_negatives(logits, may_be_negative, r_l, r_h))
    assert found.negative.any()


def test_alpha_moves_with_the_step(build):
    method, logits = cast("U2PL", build("u2pl")), _flat(_logits())
    shares = [float((~method.partition(logits, step(index)).reliable).float().mean()) for index in (0, 10, 19)]
    assert shares == pytest.approx([0.2, 0.1, 0.01], abs=0.005)


def test_as_in_the_release_one_look_gives_no_negatives(build):
    found = cast("U2PL", build("u2pl", variant="upstream")).partition(_flat(_logits()), AT)
    assert found.negative is not None
    assert not found.negative.any()
    assert 0 < (~found.reliable).sum() < 0.2 * len(found.reliable)


def test_u2pl_on_ael_has_a_quantile_of_its_own_for_negatives(build):
    method, logits = cast("U2PLAEL", build("u2pl_ael", high=0.7)), _logits()
    found = method.partition(_flat(logits), AT)
    p = logits.double().softmax(1)
    values = -(p * p.log()).sum(1)
    assert found.reliable.equal((values < np.quantile(values, 1 - ALPHA)).flatten())
    assert found.negative is not None
    high = values >= np.quantile(values, 0.7)
    assert found.negative.equal(_negatives(logits, high, method.u2pl.r_l, method.u2pl.r_h))
    assert (found.negative.any(1) & found.reliable).any(), "between the two quantiles a pixel is both"


@pytest.mark.parametrize("name", ["u2pl", "u2pl_ael"])
def test_stored_keys_are_those_of_the_bank(build, name):
    method = build(name)
    assert [len(keys) for keys in method.stored_keys()] == [0] * CLASSES
    keys = torch.nn.functional.normalize(torch.randn(CLASSES, 3, 8), dim=2)
    method.bank.push(keys, torch.arange(3) < torch.arange(CLASSES)[:, None], World())
    for c, held in enumerate(method.stored_keys()):
        assert held.allclose(keys[c, : min(c, 3)])
