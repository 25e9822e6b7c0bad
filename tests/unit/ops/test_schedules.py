from itertools import pairwise

import pytest

from pipeline.ops.schedules import cosine, ema_decay, poly, sigmoid_ramp, unreliable_share


def test_poly_rises_then_falls_to_0():
    factors = [poly(step, 100, 0.9, warmup=10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx((1 - 9 / 100) ** 0.9)
    assert all(early > late for early, late in pairwise(factors[9:]))
    assert factors[100] == 0


def test_cosine_rises_then_falls_to_0():
    factors = [cosine(step, 100, warmup=10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert [factors[25], factors[50], factors[75]] == pytest.approx([0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert all(early > late for early, late in pairwise(factors[9:]))
    assert factors[100] == 0


def test_ema_copies_until_its_start_and_warms_up_to_the_cap():
    decays = [ema_decay(step, 5, 0.9) for step in range(30)]
    assert decays[:6] == [0.0] * 6
    assert decays[6:9] == pytest.approx([1 / 2, 2 / 3, 3 / 4])
    assert set(decays[14:]) == {0.9}


def test_unreliable_share_falls_linearly():
    assert [unreliable_share(step, 4, 0.2) for step in range(5)] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.0])


def test_sigmoid_ramp_rises_to_1_and_stays():
    ramp = [sigmoid_ramp(step, 10) for step in range(20)]
    assert ramp[0] == pytest.approx(0.0067379470)
    assert ramp[5] == pytest.approx(0.2865047969)
    assert all(early < late for early, late in pairwise(ramp[:11]))
    assert set(ramp[10:]) == {1.0}
    assert sigmoid_ramp(0, 0) == 1.0
