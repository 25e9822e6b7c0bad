from collections import deque

import pytest
import torch

from pipeline.methods.ael.sampling import Reservoir, draw_index
from pipeline.ops.world import World
from tests.unit.ops.worlds import on_ranks

CLASSES, DEPTH, SIZE = 3, 2, (2, 2)


def _stream(steps: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Crops (all pixels alike, 1, 2, ...), what they show, and draws."""
    torch.manual_seed(0)
    found = []
    for i in range(steps):
        crops = (torch.arange(4) + 4 * i + 1).to(torch.uint8).view(4, 1, 1, 1).expand(4, 4, *SIZE)
        shown = torch.rand(4, CLASSES) < torch.tensor([0.9, 0.3, 0.1])
        found.append((crops, shown if i != 2 else torch.zeros_like(shown), torch.rand(3, 2)))
    return found


def _queues(steps: int, weights: torch.Tensor) -> list[deque]:
    """What the class-wise first-in-first-out lists hold."""
    queues = [deque(maxlen=DEPTH) for _ in range(CLASSES)]
    for crops, shown, draws in _stream(steps):
        for u in draws:
            possible = shown.any(0)
            if possible.any():
                k = int(draw_index(weights * possible, u[0]))
                showing = shown[:, k].nonzero().flatten()
                queues[k].append(int(crops[showing[int(u[1] * len(showing))], 0, 0, 0]))
    return queues


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_it_holds_the_newest_crops_of_each_class_on_any_number_of_ranks(ranks):
    weights = torch.tensor([1.0, 2.0, 3.0])
    for steps in (1, 3, 8):

        def run(world, steps=steps):
            reservoir = Reservoir(CLASSES, DEPTH, 4, SIZE)
            for crops, shown, draws in _stream(steps):
                part = slice(world.rank * 4 // ranks, (world.rank + 1) * 4 // ranks)
                reservoir.push(crops[part], shown[part], weights, draws, world)
            return reservoir

        expected = _queues(steps, weights)
        for reservoir in on_ranks(ranks, run):
            assert reservoir.count.tolist() == [len(queue) for queue in expected]
            for k, queue in enumerate(expected):
                held = reservoir.crops[k * DEPTH :][:DEPTH, 0, 0, 0].tolist()
                assert sorted(held[: len(queue)]) == sorted(queue)


def test_draws_come_from_classes_that_have_crops():
    reservoir = Reservoir(CLASSES, DEPTH, 4, SIZE)
    assert not reservoir.draw(torch.ones(CLASSES), torch.rand(5, 2)).found.any()
    crops = torch.arange(1, 3, dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 4, *SIZE)
    shown = torch.tensor([[False, True, False], [False, False, True]])
    for u in (0.0, 0.9):
        reservoir.push(crops, shown, torch.ones(CLASSES), torch.tensor([[u, 0.5]]), World())
    drawn = reservoir.draw(torch.tensor([5.0, 1.0, 1.0]), torch.tensor([[0.2, 0.9], [0.7, 0.3]]))
    assert drawn.found.all()
    assert drawn.label.tolist() == [1, 2]
    assert drawn.crops[:, 0, 0, 0].tolist() == [1, 2]
