import numpy as np
import pytest

from pipeline.ingest.order import Permutation, generator


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 64, 65, 100, 1000, 4097])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_permutation_is_bijective(n, seed):
    permutation = Permutation(n, seed, "x")
    images = permutation(np.arange(n))
    assert sorted(images.tolist()) == list(range(n))
    assert permutation.inverse(images).tolist() == list(range(n))
    assert permutation(permutation.inverse(np.arange(n))).tolist() == list(range(n))


def test_the_inverse_needs_no_table():
    permutation, index = Permutation(10**15, 3, "groups", 7), np.array([0, 1, 12345678901234, 10**15 - 1])
    assert permutation.inverse(permutation(index)).tolist() == index.tolist()


def test_it_depends_on_its_parts_alone():
    index = np.arange(1000)
    base = Permutation(1000, 0, "groups", 3)(index)
    assert np.array_equal(base, Permutation(1000, 0, "groups", 3)(index))
    assert np.array_equal(base[[5, 900]], Permutation(1000, 0, "groups", 3)(np.array([5, 900])))
    for other in [(1, "groups", 3), (0, "rows", 3), (0, "groups", 4)]:
        assert (Permutation(1000, *other)(index) == base).mean() < 0.02
    assert abs(np.corrcoef(base, index)[0, 1]) < 0.1


def test_every_order_of_three_occurs():
    orders = [tuple(Permutation(3, seed)(np.arange(3))) for seed in range(600)]
    assert len(set(orders)) == 6
    assert min(map(orders.count, set(orders))) > 60


def test_out_of_range_is_refused_instead_of_walking_for_ever():
    with pytest.raises(ValueError, match="index 5 in a permutation of 5"):
        Permutation(5)(np.array([0, 5]))
    with pytest.raises(ValueError, match="index 5 in a permutation of 5"):
        Permutation(5).inverse(np.array([0, 5]))
    with pytest.raises(ValueError, match="permutation of 0"):
        Permutation(0)


def test_generators_are_keyed_by_all_parts():
    assert generator(1, "a").random() == generator(1, "a").random()
    draws = {generator(*parts).random() for parts in [(1, "a"), (1, "b"), (2, "a"), ("1a",), (1, "a", 0)]}
    assert len(draws) == 5
