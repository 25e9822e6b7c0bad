"""A copy that training does not change, of which the same file is written."""

import hashlib
import io

import pytest
import torch

from pipeline.methods import METHODS
from pipeline.training.optim import build_optimizer
from pipeline.training.snapshot import snapshot
from tests.unit.methods.conftest import batch, small, step


def _file(state: object) -> str:
    """The digest of what torch writes of a state."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


@pytest.mark.parametrize("name", METHODS)
def test_the_file_is_that_of_the_state_when_it_was_taken(name):
    method = small(name)
    optimizer = build_optimizer(method, method.config.optim)

    def train(index: int) -> None:
        torch.stack(list(method(batch(), step(index)).terms.values())).sum().backward()
        optimizer.step()
        method.after_step(step(index))

    def state() -> dict[str, object]:
        return {"method": method.state_dict(), "optimizer": optimizer.state_dict()}

    train(4)
    before, taken = _file(state()), snapshot(state())
    assert _file(taken()) == before
    train(5)
    assert _file(taken()) == before
    assert _file(state()) != before


def test_what_shares_memory_still_does():
    whole = torch.arange(6.0)
    first, second = snapshot([whole[:3], {"all": whole}])()
    first[0] = 7.0
    assert second["all"].tolist() == [7.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert whole[0] == 0
