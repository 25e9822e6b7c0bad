"""Which image is labeled next: against the definitions, pixel by pixel."""

import csv
import io
import math

import numpy as np
import pytest
import torch

from pipeline.inference.ranking import (
    BINS,
    FEATURES,
    Ranked,
    Uncertainty,
    as_csv,
    diversified,
    fingerprint,
    measure,
    rank,
)
from pipeline.ops.entropy import relative_entropy

CLASSES = 5


def logits(seed: int, height: int, width: int) -> torch.Tensor:
    """Of an image, the more certain the smaller `seed` is."""
    return torch.randn(CLASSES, height, width, generator=torch.Generator().manual_seed(seed)) * 8 / (1 + seed)


IMAGES = {f"photo {seed}": logits(seed, 20 + seed, 30 - seed) for seed in range(7)}


def pixel_entropies(values: torch.Tensor) -> np.ndarray:
    """Of each pixel in units of log C, in double precision."""
    p = values.double().softmax(0).numpy()
    return (-(p * np.log(p)).sum(0) / math.log(CLASSES)).ravel()


def measured() -> list[tuple[str, Uncertainty]]:
    return [(name, measure(values, relative_entropy(values))) for name, values in IMAGES.items()]


def test_the_measures_are_their_definitions() -> None:
    for name, found in measured():
        exact = pixel_entropies(IMAGES[name])
        p = np.sort(IMAGES[name].double().softmax(0).numpy(), axis=0)
        assert found.entropy == pytest.approx(exact.mean(), abs=1e-5)
        assert found.margin == pytest.approx((1 - (p[-1] - p[-2])).mean(), abs=1e-5)
        expected = np.histogram(exact, BINS, (0, 1))[0]
        assert np.abs(np.array(found.histogram) - expected).sum() <= 2  # float32 may move a pixel to the next bin
        assert sum(found.histogram) == exact.size


def test_unreliable_pixels_are_the_upper_fifth_of_all_images() -> None:
    every = np.concatenate([pixel_entropies(values) for values in IMAGES.values()])
    edge = math.ceil(np.quantile(every, 0.8) * BINS) / BINS  # the quantile, rounded up to the end of its bin
    assert 0.18 < (every > edge).mean() <= 0.2
    for each in rank(measured(), "unreliable"):
        assert each.unreliable == pytest.approx((pixel_entropies(IMAGES[each.name]) > edge).mean(), abs=0.005)


@pytest.mark.parametrize("by", ["entropy", "margin", "unreliable"])
def test_the_least_certain_image_comes_first(by: str) -> None:
    found = rank(measured(), by)
    values = [getattr(each, by) for each in found]
    assert values == sorted(values, reverse=True)
    assert (found[0].name, found[-1].name) == ("photo 6", "photo 0")


def test_equal_images_come_by_name() -> None:
    same = Uncertainty(0.5, 0.5, (3, *[0] * (BINS - 2), 1))
    assert [each.name for each in rank([("b", same), ("c", same), ("a", same)], "margin")] == ["a", "b", "c"]
    assert rank([("a", same)], "unreliable")[0].unreliable == 0  # more than a fifth is in the last bin


def test_a_fingerprint_is_the_mean_over_windows_and_pixels() -> None:
    maps = torch.arange(24.0).view(2, 1, 3, 2, 2)  # two windows, three channels
    assert fingerprint([*maps]) == (7.5, 11.5, 15.5)


def test_fingerprints_of_many_channels_keep_distances() -> None:
    means = torch.rand(8, 2048, generator=torch.Generator().manual_seed(1))
    found = torch.tensor([fingerprint([mean.view(1, -1, 1, 1).expand(-1, -1, 2, 3)]) for mean in means])
    assert found.shape == (8, FEATURES)
    apart = ~torch.eye(8, dtype=torch.bool)
    assert (torch.cdist(found, found) / torch.cdist(means, means))[apart].sub(1).abs().max() < 0.25


def test_the_first_also_differ() -> None:
    """Against the definition, one image at a time."""
    draw = np.random.default_rng(0)
    shows = draw.random((30, 5))
    shows[1] = shows[0]  # the second best shows what the best does
    ranking = [Ranked(f"{at:02d}", 1 - at / 100, 0, 0) for at in range(30)]
    found = diversified(ranking, "entropy", shows, 6)
    chosen = [0]
    for _ in range(5):
        gains = {
            at: ranking[at].entropy * min(np.linalg.norm(shows[at] - shows[other]) for other in chosen)
            for at in set(range(30)) - set(chosen)
        }
        chosen.append(max(gains, key=lambda at: gains[at]))
    assert [int(each.name) for each in found[:6]] == chosen
    assert 1 not in chosen
    assert found[6:] == [each for each in ranking if each not in found[:6]]
    assert sorted(diversified(ranking, "entropy", shows, 99)) == sorted(ranking)


def test_images_that_show_the_same_are_all_there() -> None:
    ranking = [Ranked(name, 0, 0, 0) for name in "abc"]
    assert diversified(ranking, "margin", np.ones((3, 2)), 3) == ranking


def test_the_table_holds_every_image() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(rank([("a, b", measured()[0][1])], "margin"), "margin"))))
    (row,) = rows
    assert (row["rank"], row["name"], row["score"]) == ("1", "a, b", row["margin"])
    assert list(row) == ["rank", "name", "score", "entropy", "margin", "unreliable"]


def test_certain_and_undecided_pixels_are_the_ends_of_the_scale() -> None:
    values = torch.zeros(CLASSES, 1, 2)
    values[0, 0, 0] = 200
    found = measure(values, relative_entropy(values))
    assert found.entropy == pytest.approx(0.5)
    assert found.margin == pytest.approx(0.5)
    assert (found.histogram[0], found.histogram[-1]) == (1, 1)
