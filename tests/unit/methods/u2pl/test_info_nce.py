"""Loss and gradient in one pass against the equations, written plainly and differentiated by autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.methods.u2pl.fast import gathered_dots, info_nce

C, M, N, D, ROWS = 3, 6, 8, 4, 20


def _inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anchors, positives = (torch.randn(shape, generator=generator) for shape in ((C, M, D), (C, D)))
    keys = F.normalize(torch.randn(ROWS, D, generator=generator), dim=-1)
    return anchors, positives, keys, torch.randint(0, ROWS, (C, M, N), generator=generator)


def _plain(anchors: Tensor, positives: Tensor, negatives: Tensor, temperature: float, binary: bool) -> Tensor:
    """Float64 [C]; `negatives` [C,M,N,D]."""
    anchors, positives, negatives = anchors.double(), positives.double(), negatives.double()
    own = F.cosine_similarity(anchors, positives[:, None], dim=-1) / temperature
    others = F.cosine_similarity(anchors[:, :, None], negatives, dim=-1) / temperature
    if binary:  # -log sigmoid(s+) - 1/N sum log(1 - sigmoid(s-))
        return (-own.sigmoid().log() - (1 - others.sigmoid()).log().mean(-1)).mean(-1)
    return -(own.exp() / (own.exp() + others.exp().sum(-1))).log().mean(-1)


def _gradient(losses: Tensor, leaf: Tensor) -> Tensor:
    """Of a sum with unequal weights, one of them negative, one 0."""
    (losses * torch.tensor([1.5, 0.0, -2.0])).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_loss_and_gradient_are_those_of_the_equation(temperature, binary):
    anchors, positives, keys, index = _inputs()
    one, two = anchors.clone().requires_grad_(), anchors.double().requires_grad_()
    found = info_nce(one, positives, keys, index, temperature, binary=binary)
    expected = _plain(two, positives, keys[index], temperature, binary)
    assert found.shape == (C,)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    gradient = _gradient(found, one)
    torch.testing.assert_close(gradient.double(), _gradient(expected, two), rtol=1e-5, atol=1e-6)
    assert not gradient[1].any()


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_shared_negatives_are_repeated_rows(groups, binary):
    anchors, positives, keys, _ = _inputs(2)
    shared = torch.randint(0, ROWS, (C, groups, N), generator=torch.Generator().manual_seed(3))
    index = shared.repeat_interleave(M // groups, 1)
    one, two = anchors.clone().requires_grad_(), anchors.double().requires_grad_()
    found = info_nce(one, positives, keys, index, 0.5, binary=binary)
    negatives = torch.stack([keys[shared[:, anchor * groups // M]] for anchor in range(M)], 1)
    expected = _plain(two, positives, negatives, 0.5, binary)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(_gradient(found, one).double(), _gradient(expected, two), rtol=1e-5, atol=1e-6)


def test_the_same_key_drawn_twice_counts_twice():
    anchors, positives, keys, index = _inputs()
    index[:] = index[:, :, :1]
    one, two = anchors.clone().requires_grad_(), anchors.double().requires_grad_()
    found, expected = info_nce(one, positives, keys, index, 0.5), _plain(two, positives, keys[index], 0.5, False)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(_gradient(found, one).double(), _gradient(expected, two), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("binary", [False, True])
def test_bfloat16_keys_stay_close(binary):
    anchors, positives, keys, index = _inputs()
    one, two = anchors.clone().requires_grad_(), anchors.double().requires_grad_()
    stored = keys.bfloat16()
    found = info_nce(one, positives, stored, index, 0.5, binary=binary)
    assert found.dtype == torch.float32
    # the loss knows no other error than the keys' own rounding, which leaves their lengths off 1
    expected = _plain(two, positives, keys[index], 0.5, binary)
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(_gradient(found, one).double(), _gradient(expected, two), rtol=2e-2, atol=5e-3)


def test_bfloat16_anchors_get_a_bfloat16_gradient():
    anchors, positives, keys, index = _inputs()
    low = anchors.bfloat16().requires_grad_()
    two = low.detach().double().requires_grad_()
    found = info_nce(low, positives.bfloat16(), keys, index, 0.5)
    expected = _plain(two, positives.bfloat16(), keys[index], 0.5, False)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    gradient = _gradient(found, low)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), _gradient(expected, two), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("binary", [False, True])
def test_length_of_anchor_and_positive_do_not_matter(binary):
    anchors, positives, keys, index = _inputs()
    short = anchors.clone().requires_grad_()
    long = (100 * anchors).requires_grad_()
    first = info_nce(short, positives, keys, index, 0.5, binary=binary)
    second = info_nce(long, 7 * positives, keys, index, 0.5, binary=binary)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(_gradient(first, short), 100 * _gradient(second, long))
    assert short.grad is not None
    torch.testing.assert_close((short.grad * short).sum(-1), torch.zeros(C, M), rtol=0, atol=1e-6)


@pytest.mark.parametrize("binary", [False, True])
def test_zeros_are_finite(binary):
    """Anchors of a dead feature, positives of an absent class, the rows of an empty bank."""
    anchors, positives, keys, index = (torch.zeros_like(x) for x in _inputs())
    anchors.requires_grad_()
    found = info_nce(anchors, positives, keys, index, 0.5, binary=binary)
    assert found.isfinite().all()
    assert _gradient(found, anchors).isfinite().all()
    other = _inputs()[0].requires_grad_()
    found = info_nce(other, positives, keys, index, 0.5, binary=binary)
    assert not _gradient(found, other).any()  # all cosines are 0 wherever the anchor points


def test_a_small_temperature_does_not_overflow():
    anchors, positives, keys, index = _inputs()
    anchors.requires_grad_()
    found = info_nce(anchors, positives, keys, index, 1e-3)
    assert found.isfinite().all()
    assert _gradient(found, anchors).isfinite().all()


def test_positives_and_keys_get_no_gradient():
    anchors, positives, keys, index = _inputs()
    positives.requires_grad_()
    keys.requires_grad_()
    info_nce(anchors.requires_grad_(), positives, keys, index, 0.5).sum().backward()
    assert positives.grad is None
    assert keys.grad is None


def test_the_compiled_form_of_the_cosines_is_the_same():
    anchors, _, keys, index = _inputs()
    expected = torch.einsum("cmd,cmnd->cmn", anchors, keys[index])
    torch.testing.assert_close(gathered_dots(anchors, keys, index), expected)
