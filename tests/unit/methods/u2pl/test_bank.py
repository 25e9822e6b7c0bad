import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.methods.u2pl.bank import MemoryBank
from pipeline.ops.world import World
from tests.unit.methods.u2pl.banks import ordered
from tests.unit.ops.worlds import on_ranks

SIZES = [7, 4, 1]
DIM = 3
LARGEST = 1 - 2**-24


def _push(generator: torch.Generator, most: int = 6, first: bool = False) -> tuple[Tensor, Tensor]:
    """Keys of each class; those that count lie anywhere, or all at the beginning."""
    keys = torch.randn(len(SIZES), most, DIM, generator=generator)
    counts = torch.randint(0, most + 1, (len(SIZES), 1), generator=generator)
    places = torch.arange(most).expand(len(SIZES), -1)
    if not first:
        places = torch.rand(len(SIZES), most, generator=generator).argsort(1)
    return keys, places < counts


def _contents(bank: MemoryBank) -> list[list[list[float]]]:
    return [ordered(bank, label).tolist() for label in range(len(SIZES))]


def _pushed(banks: list[MemoryBank], push: list[tuple[Tensor, Tensor]], world: World) -> MemoryBank:
    """This rank's bank after its push; the one before stays, as `on_ranks` runs several times."""
    bank = copy.deepcopy(banks[world.rank])
    bank.push(*push[world.rank], world)
    return bank


@pytest.mark.parametrize("first", [True, False])
def test_queues_are_first_in_first_out(first):
    """More than fits at once included: pushes of up to 6 keys into queues of 7, 4 and 1."""
    generator = torch.Generator().manual_seed(0)
    bank, naive = MemoryBank(SIZES, DIM), [[] for _ in SIZES]
    for _ in range(40):
        keys, valid = _push(generator, first=first)
        bank.push(keys, valid, World())
        for label, size in enumerate(SIZES):
            naive[label] = (naive[label] + F.normalize(keys[label][valid[label]], dim=-1).tolist())[-size:]
        assert _contents(bank) == naive
        assert bank.count.tolist() == [len(queue) for queue in naive]


def test_nothing_valid_changes_nothing():
    bank = MemoryBank(SIZES, DIM)
    bank.push(*_push(torch.Generator().manual_seed(0)), World())
    before = _contents(bank)
    bank.push(torch.randn(3, 6, DIM), torch.zeros(3, 6, dtype=torch.bool), World())
    assert _contents(bank) == before


def test_ranks_push_in_rank_order_into_equal_banks():
    generator = torch.Generator().manual_seed(1)
    pushes = [[_push(generator) for _ in range(2)] for _ in range(15)]
    banks = [MemoryBank(SIZES, DIM) for _ in range(2)]
    alone = MemoryBank(SIZES, DIM)
    for push in pushes:
        banks = on_ranks(2, partial(_pushed, banks, push))
        for keys, valid in push:
            alone.push(keys, valid, World())
        assert _contents(banks[0]) == _contents(banks[1]) == _contents(alone)
        assert torch.equal(banks[0].keys, banks[1].keys)


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
def test_keys_that_are_not_finite_are_left_out(damage):
    """On any rank, and the others keep their order."""
    generator = torch.Generator().manual_seed(2)
    banks, alone = [MemoryBank(SIZES, DIM) for _ in range(2)], MemoryBank(SIZES, DIM)
    for _ in range(10):
        push = []
        for _ in range(2):
            keys, valid = _push(generator)
            damaged = torch.rand(valid.shape, generator=generator) < 0.3
            keys[..., 1] = torch.where(damaged, damage, keys[..., 1])
            push.append((keys, valid))
            alone.push(keys.nan_to_num(), valid & ~damaged, World())
        banks = on_ranks(2, partial(_pushed, banks, push))
        assert _contents(banks[0]) == _contents(alone)
        assert torch.equal(banks[0].count, alone.count)
        assert torch.equal(banks[0].keys, banks[1].keys)
        assert banks[0].keys.isfinite().all()


def test_a_key_of_zeros_is_stored_as_such():
    bank = MemoryBank([2], DIM)
    bank.push(torch.zeros(1, 1, DIM), torch.ones(1, 1, dtype=torch.bool), World())
    assert ordered(bank, 0).tolist() == [[0.0] * DIM]


def test_half_precision_features_are_normalised_in_float32():
    """Their squares do not fit: 300^2 is beyond float16."""
    bank = MemoryBank([4], DIM)
    bank.push(torch.full((1, 2, DIM), 300.0, dtype=torch.float16), torch.ones(1, 2, dtype=torch.bool), World())
    torch.testing.assert_close(ordered(bank, 0), torch.full((2, DIM), 3**-0.5))


def test_bfloat16_keys_are_those_of_float32_rounded():
    generator = torch.Generator().manual_seed(3)
    bank, exact = MemoryBank(SIZES, DIM, torch.bfloat16), MemoryBank(SIZES, DIM)
    for _ in range(5):
        keys, valid = _push(generator)
        bank.push(keys, valid, World())
        exact.push(keys, valid, World())
    assert bank.keys.dtype == torch.bfloat16
    for label in range(len(SIZES)):
        assert torch.equal(ordered(bank, label), ordered(exact, label).bfloat16())


def test_draws_come_from_the_own_class():
    bank = MemoryBank(SIZES, DIM)
    keys = torch.zeros(3, 4, DIM)
    keys[torch.arange(3), :, torch.arange(3)] = 1.0
    valid = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [False] * 4])
    bank.push(keys, valid, World())
    torch.manual_seed(0)
    index = bank.draw(torch.rand(3, 50, 2))
    assert index.shape == (3, 50, 2)
    assert (bank.keys[index[0]] == keys[0, 0]).all()
    assert (bank.keys[index[1]] == keys[1, 0]).all()
    assert set(index[0].flatten().tolist()) == {0, 1, 2, 3}
    assert (index[2] == 11).all()  # empty: its first slot, which the loss masks by the count
    assert (bank.draw(torch.full((3, 1), LARGEST)).flatten() == torch.tensor([3, 8, 11])).all()


def test_draws_count_from_the_oldest():
    """Before a queue is full, when it just is, and after it wrapped."""
    generator = torch.Generator().manual_seed(4)
    bank = MemoryBank(SIZES, DIM)
    for _ in range(12):
        bank.push(*_push(generator, 2), World())
        for label in range(len(SIZES)):
            count = int(bank.count[label])
            if count:
                uniform = ((torch.arange(count) + 0.5) / count).expand(len(SIZES), -1)
                assert torch.equal(bank.keys[bank.draw(uniform)[label]], ordered(bank, label))


def test_draws_are_uniform_over_a_wrapped_queue():
    bank = MemoryBank([8], 1)
    bank.push(torch.ones(1, 11, 1), torch.ones(1, 11, dtype=torch.bool), World())
    assert bank.pointer.tolist() == [3]
    torch.manual_seed(0)
    counts = torch.bincount(bank.draw(torch.rand(1, 16_000)).flatten(), minlength=9)
    assert counts[8] == 0  # the row for what is thrown away
    assert (counts[:8] - 2000).abs().max() < 200


def test_state_holds_content_and_pointers():
    bank = MemoryBank(SIZES, DIM)
    bank.push(*_push(torch.Generator().manual_seed(2)), World())
    assert set(bank.state_dict()) == {"keys", "pointer", "count"}
    other = MemoryBank(SIZES, DIM)
    other.load_state_dict(bank.state_dict())
    assert _contents(other) == _contents(bank)
