"""Drawn images of twelve bands and 16 bits, which RGB does not tell apart."""

import numpy as np

SIDE, BANDS = 48, 12
TOLD_BY = {1: 7, 2: 9}
"""Band in which each class is brighter; the first three bands tell none of them."""


def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint16 [H,W,12] in 0..10000, and its classes: fields (1) and water (2) on other ground (0)."""
    rng = np.random.default_rng(number)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for kind in (1, 2, 1, 2):
        top, left = rng.integers(0, SIDE - 16, 2)
        height, width = rng.integers(12, 28, 2)
        mask[top : top + height, left : left + width] = kind
    values = 3000 + 600 * rng.standard_normal((SIDE, SIDE, BANDS))
    for kind, band in TOLD_BY.items():
        values[mask == kind, band] += 2500
    return values.clip(0, 10_000).astype(np.uint16), mask
