"""Which images a network is least sure of: these are the ones to label next."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.inference.pictures import UNRELIABLE_SHARE

BINS = 256
"""Of an image's histogram of entropies, from 0 to log C."""
FEATURES = 128
"""Numbers at most that stand for what an image shows: their distances are those of the encoder's features, nearly."""


@dataclass(frozen=True)
class Uncertainty:
    """How unsure a network is of one image."""

    entropy: float
    """Mean over the pixels of the entropy, in units of log C: 0..1."""
    margin: float
    """Mean over the pixels of 1 - (p1 - p2), the two largest probabilities: 0..1."""
    histogram: tuple[int, ...]
    """[BINS], how many pixels have an entropy from k / BINS on and below (k + 1) / BINS, in units of log C."""

    def __post_init__(self) -> None:
        if len(self.histogram) != BINS or not sum(self.histogram):
            raise ValueError("a histogram of another kind")


class Ranked(NamedTuple):
    """One line of a ranking."""

    name: str
    entropy: float
    margin: float
    unreliable: float
    """Share of its pixels whose entropy is in the upper `UNRELIABLE_SHARE` of the pixels of all images, to 1 / BINS of
    log C: 0..1."""


SCORES = Ranked._fields[1:]
"""What images can be ranked by."""


def measure(logits: Tensor, relative: Tensor) -> Uncertainty:
    """How unsure a network is.

    Args:
        logits: [C,H,W], C at least 2.
        relative: what `relative_entropy` gives of them.
    """
    first, second = logits.softmax(0).topk(2, 0).values
    counts = (relative * BINS).long().clamp_max(BINS - 1).flatten().bincount(minlength=BINS)
    return Uncertainty(
        float(relative.mean()), float((1 - (first - second)).mean()), tuple(int(count) for count in counts.tolist())
    )


def fingerprint(high: Sequence[Tensor]) -> tuple[float, ...]:
    """What an image shows, as the encoder sees it: images that look alike are close to each other.

    Args:
        high: the encoder's last maps of the image's windows, each [1,c,h,w].

    Returns:
        Their mean over windows and pixels; of more than `FEATURES` channels a random projection, the same for all
        images, which keeps distances within some percent (Johnson and Lindenstrauss).
    """
    mean = torch.stack([each.float().mean((0, 2, 3)) for each in high]).mean(0).cpu()
    if len(mean) > FEATURES:
        directions = torch.randn(FEATURES, len(mean), generator=torch.Generator().manual_seed(0))
        mean = directions @ mean / FEATURES**0.5
    return tuple(float(f"{value:.4g}") for value in mean.tolist())


def rank(images: Iterable[tuple[str, Uncertainty]], by: str) -> list[Ranked]:
    """The images, those to label first at the top; of equal ones the first by name.

    Args:
        images: names and measures, at least one.
        by: out of `SCORES`.
    """
    found: list[tuple[str, float, float]] = []
    rows = []
    for name, each in images:
        found.append((name, each.entropy, each.margin))
        rows.append(np.array(each.histogram, np.uint32))
    counts = np.stack(rows)
    total = counts.sum(0)
    place = int(np.searchsorted(total.cumsum(), (1 - UNRELIABLE_SHARE) * total.sum()))  # the bin with the quantile
    shares = (counts[:, place + 1 :].sum(1) / counts.sum(1)).tolist()
    ranking = [Ranked(*each, share) for each, share in zip(found, shares, strict=True)]
    return sorted(ranking, key=lambda each: (-getattr(each, by), each.name))


def diversified(ranking: Sequence[Ranked], by: str, fingerprints: np.ndarray, first: int) -> list[Ranked]:
    """A ranking whose first images also differ from each other: ten frames of one street teach little more than one.

    After the image with the highest score, the next is always the one with the greatest product of its score and its
    distance to the nearest image before it.

    Args:
        ranking: what `rank` gives.
        by: the score.
        fingerprints: float [N,D], that of each image in the ranking's order.
        first: how many are chosen so, at least 1; the others follow by their score.
    """
    scores = np.array([getattr(each, by) for each in ranking])
    nearest = np.linalg.norm(fingerprints - fingerprints[0], axis=1)
    chosen = [0]
    while len(chosen) < min(first, len(ranking)):
        gains = scores * nearest
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(fingerprints - fingerprints[chosen[-1]], axis=1))
    taken = set(chosen)
    return [ranking[at] for at in chosen] + [each for at, each in enumerate(ranking) if at not in taken]


def as_csv(ranking: Sequence[Ranked], by: str) -> str:
    """The ranking as a table with a head: rank (from 1), name, score, and all three measures."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["rank", "name", "score", *SCORES])
    for number, each in enumerate(ranking, start=1):
        values = [f"{getattr(each, score):.6f}" for score in (by, *SCORES)]
        table.writerow([number, each.name, *values])
    return text.getvalue()
