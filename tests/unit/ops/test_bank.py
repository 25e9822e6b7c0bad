import copy
from functools import partial

import torch
import torch.nn.functional as F

from pipeline.ops.bank import MemoryBank
from pipeline.ops.world import World
from tests.unit.ops.worlds import on_ranks

SIZES = [7, 4, 1]
DIM = 3


def _push(generator: torch.Generator, most: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of each class, of which the first few count."""
    keys = torch.randn(len(SIZES), most, DIM, generator=generator)
    counts = torch.randint(0, most + 1, (len(SIZES), 1), generator=generator)
    return keys, torch.arange(most) < counts


def _contents(bank: MemoryBank) -> list[list[list[float]]]:
    return [bank.ordered(label).tolist() for label in range(len(SIZES))]


def _pushed(banks: list[MemoryBank], push: list[tuple[torch.Tensor, torch.Tensor]], world: World) -> MemoryBank:
    """This rank's bank after its push; the one before stays, as `on_ranks` runs several times."""
    bank = copy.deepcopy(banks[world.rank])
    bank.push(*push[world.rank], world)
    return bank


def test_queues_are_first_in_first_out():
    """More than fits at once included: pushes of up to 6 keys into queues of 7, 4 and 1."""
    generator = torch.Generator().manual_seed(0)
    bank, naive = MemoryBank(SIZES, DIM), [[] for _ in SIZES]
    for _ in range(40):
        keys, valid = _push(generator)
        bank.push(keys, valid, World())
        for label, size in enumerate(SIZES):
            naive[label] = (naive[label] + F.normalize(keys[label][valid[label]], dim=-1).tolist())[-size:]
        assert _contents(bank) == naive
        assert bank.count.tolist() == [len(queue) for queue in naive]


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


def test_draws_come_from_the_own_class():
    bank = MemoryBank(SIZES, DIM)
    keys = torch.zeros(3, 4, DIM)
    keys[torch.arange(3), :, torch.arange(3)] = 1.0
    valid = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [False] * 4])
    bank.push(keys, valid, World())
    torch.manual_seed(0)
    index = bank.draw(torch.rand(3, 50, 2))
    assert (bank.keys[index[0]] == keys[0, 0]).all()
    assert (bank.keys[index[1]] == keys[1, 0]).all()
    assert set(index[0].flatten().tolist()) == {0, 1, 2, 3}
    assert (index[2] == 11).all()  # empty: its first slot, which the loss masks by the count
    assert (bank.draw(torch.full((3, 1), 1 - 2**-24)).flatten() == torch.tensor([3, 8, 11])).all()


def test_row_counts_from_the_oldest_after_a_wrap():
    bank = MemoryBank([3], 1)
    bank.push(torch.tensor([[[1.0], [-1.0], [1.0], [-1.0]]]), torch.ones(1, 4, dtype=torch.bool), World())
    assert bank.keys[bank.row(torch.arange(3)[None])].flatten().tolist() == [-1.0, 1.0, -1.0]
    assert bank.pointer.tolist() == [1]


def test_state_holds_content_and_pointers():
    bank = MemoryBank(SIZES, DIM)
    bank.push(*_push(torch.Generator().manual_seed(2)), World())
    assert set(bank.state_dict()) == {"keys", "pointer", "count"}
    other = MemoryBank(SIZES, DIM)
    other.load_state_dict(bank.state_dict())
    assert _contents(other) == _contents(bank)
