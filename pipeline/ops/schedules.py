"""Quantities that follow the step: learning rate, EMA decay, unreliable share, ramps."""

import math


def poly(step: int, steps: int, power: float, warmup: int = 0) -> float:
    """Factor of the learning rate: (1 - step/steps)^power, times the linear rise of the warm-up.

    It is a function of the step alone, so a resumed run has the right one; in the release of U2PL a resume freezes it.
    """
    return linear_rise(step, warmup) * max(0.0, 1.0 - step / steps) ** power


def cosine(step: int, steps: int, warmup: int = 0) -> float:
    """Factor of the learning rate: (1 + cos(pi step/steps)) / 2, times the linear rise of the warm-up."""
    return linear_rise(step, warmup) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))


def linear_rise(step: int, length: int) -> float:
    """From 1/length to 1 over `length` steps; a length of 0 is none: always 1."""
    return min(1.0, (step + 1) / length) if length else 1.0


def ema_decay(step: int, start: int, cap: float) -> float:
    """Decay of the EMA teacher: min(1 - 1/(step - start + 1), cap), and 0 before `start`.

    A decay of 0 copies the student. So the teacher is an exact copy at `start`, and averages from there.
    """
    return min(1.0 - 1.0 / (step - start + 1), cap) if step >= start else 0.0


def unreliable_share(step: int, steps: int, alpha_0: float) -> float:
    """alpha_t = alpha_0 (1 - t/T): the share of unlabeled pixels that counts as unreliable (paper eq. 7)."""
    return alpha_0 * max(0.0, 1.0 - step / steps)


def sigmoid_ramp(step: int, length: float) -> float:
    """exp(-5 (1 - t/length)^2): rises from 0.0067 to 1 within `length` steps (Laine and Aila, ICLR 2017).

    A length of 0 is no ramp: always 1.
    """
    rest = max(0.0, 1.0 - step / length) if length else 0.0
    return math.exp(-5.0 * rest * rest)
