"""Several ranks in one process: their collectives meet in a recording."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.ops.world import World


@dataclass(frozen=True)
class RecordedWorld(World):
    """A rank whose collectives answer from what all ranks are known to contribute."""

    mine: list[Tensor] = field(default_factory=list)
    """What this rank put into its collectives, in order."""
    everyone: list[list[Tensor]] = field(default_factory=list)
    """By collective: what each rank puts in."""

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack(self._all(value)).sum(0).to(value.dtype)

    def gather(self, value: Tensor) -> Tensor:
        return torch.stack(self._all(value))

    def _all(self, value: Tensor) -> list[Tensor]:
        number = len(self.mine)
        self.mine.append(value.detach().clone())
        if number < len(self.everyone):
            return self.everyone[number]
        return [value.detach() for _ in range(self.size)]


def on_ranks(size: int, run: Callable[[World], Any]) -> list[Any]:
    """`run` on each of `size` ranks; a collective's input may depend on the result of the ones before it."""
    known: list[list[Tensor]] = []
    while True:
        worlds = [RecordedWorld(rank, size, [], known) for rank in range(size)]
        results = [run(world) for world in worlds]
        if len(worlds[0].mine) == len(known):
            return results
        known = [*known, [world.mine[len(known)] for world in worlds]]
