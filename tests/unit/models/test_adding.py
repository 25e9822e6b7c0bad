"""The example of `docs/adding-a-backbone.md`, as a reader would use it."""

import re
import sys
from types import ModuleType

import pytest
import torch

from pipeline.config.backbones import BACKBONES, Backbone
from pipeline.methods import METHODS
from tests.conftest import ROOT
from tests.unit.methods.conftest import batch, small, train_step

PAGE = (ROOT / "docs" / "adding-a-backbone.md").read_text()
CODE, LINE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> str:
    """The encoder of the page, registered by the line of the page."""
    module = ModuleType("pipeline.models.plain")
    exec(compile(CODE, "plain.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    registered = re.search(r'"(\w+)": Backbone\((.*)\)}', LINE)
    assert registered is not None
    values = re.findall(r'"([^"]+)"', registered[2])
    monkeypatch.setitem(BACKBONES, registered[1], Backbone(*values))
    return registered[1]


def test_the_example_is_short():
    assert sum(bool(line.strip()) for line in CODE.splitlines()) <= 20


@pytest.mark.parametrize("name", ["cct", "unimatch"])
def test_the_example_trains(name, plain):
    assert name in METHODS
    torch.set_num_threads(1)
    method, on = small(name, model={"backbone": plain, "width": 8}), batch()
    losses = [train_step(method, index, on, lr=0.05)["supervised"] for index in range(12)]
    assert losses[-1] < losses[0]
