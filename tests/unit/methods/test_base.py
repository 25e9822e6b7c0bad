import torch

from pipeline.methods import Step
from pipeline.ops.world import World

CPU = torch.device("cpu")


def _step(index: int = 3, rank: int = 0, size: int = 1, seed: int = 0) -> Step:
    return Step(index, 10, seed, World(rank, size))


def test_draws_depend_on_seed_step_rank_and_name_alone():
    first = _step().uniform("a", (50,), CPU)
    torch.rand(7)
    assert torch.equal(first, _step().uniform("a", (50,), CPU))
    others = [
        _step(index=4).uniform("a", (50,), CPU),
        _step(seed=1).uniform("a", (50,), CPU),
        _step(rank=1, size=2).uniform("a", (50,), CPU),
        _step().uniform("b", (50,), CPU),
    ]
    assert not any(torch.equal(first, other) for other in others)
    assert ((first >= 0) & (first < 1)).all()


def test_shared_draws_are_equal_on_all_ranks():
    one, two = (_step(rank=rank, size=2).uniform_shared("a", (5,), CPU) for rank in range(2))
    assert torch.equal(one, two)


def test_draws_per_image_are_cut_from_the_global_batch():
    whole = _step().uniform_per_image("a", (4, 3), CPU)
    parts = [_step(rank=rank, size=2).uniform_per_image("a", (2, 3), CPU) for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)
