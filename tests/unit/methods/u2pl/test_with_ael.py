import dataclasses
import re
from typing import Any, cast

import numpy as np
import pytest
import torch

from pipeline.config.options import U2PLAELOptions, U2PLOptions
from pipeline.errors import UserError
from pipeline.methods.ael.ael import AEL, Task
from pipeline.methods.u2pl import with_ael
from pipeline.methods.u2pl.u2pl import read_options
from pipeline.methods.u2pl.with_ael import U2PLAEL
from pipeline.models import upsample
from pipeline.ops.grid import shrink
from tests.docs import ROOT
from tests.unit.methods.conftest import SIZE, batch, step, train_step

START = 3


def _u2pl_ael(build, **options) -> U2PLAEL:
    return cast("U2PLAEL", build("u2pl_ael", **options))


class _Spy:
    """Keeps what is handed to `function` and passes it on."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.given: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> Any:
        self.given = args
        return self.function(*args)


def _prepared(method: U2PLAEL, monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Will hold what the next step prepares."""
    found, prepare = [], method.prepare

    def keep(*args: Any) -> Task:
        found.append(prepare(*args))
        return found[-1]

    monkeypatch.setattr(method, "prepare", keep)
    return found


def _entropy(method: U2PLAEL, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Of the teacher's second look at the mixed images, from the definition: at full and at the logits' size."""
    with torch.no_grad():
        seen = torch.cat([task.labeled.image, task.mixed])
        logits = method.teacher.eval()(seen).logits[len(task.labeled.image) :]
    p = upsample(logits, (SIZE, SIZE)).softmax(1)
    full = -(p * p.log()).sum(1)
    return full.numpy(), shrink(full, (logits.shape[2], logits.shape[3])).numpy()


def test_the_contrast_joins_after_its_start(build):
    method = _u2pl_ael(build)
    for index in range(START + 1):
        terms = train_step(method, index)
        assert terms.keys() == {"supervised", "consistency_labeled", "consistency_mixed", "contrastive"}
        assert (terms["contrastive"] > 0) == (index >= START)
        assert bool((method.bank.count > 0).any()) == (index >= START)


@pytest.mark.parametrize("index", [0, 10])
def test_the_most_uncertain_mixed_pixels_carry_no_label(index, build, monkeypatch):
    """20 (1 - t/T) % of the valid pixels; the release drops the surest ones."""
    method = _u2pl_ael(build)
    given = _Spy(AEL.losses)
    monkeypatch.setattr(AEL, "losses", lambda *args: given(*args))
    task = _prepared(method, monkeypatch)
    method(batch(), step(index))
    full, _ = _entropy(method, task[0])
    known = (task[0].of_mixed.confidence > 0).numpy()
    gamma = np.quantile(full[known], 1 - 0.2 * (1 - index / 20))
    kept = given.given[2].of_mixed.confidence
    torch.testing.assert_close(kept, task[0].of_mixed.confidence * torch.from_numpy(full < gamma))
    assert 0.75 < float((kept > 0).sum() / known.sum()) < 0.95


def test_anchors_and_negatives_are_fixed_shares(build, monkeypatch):
    method, pixels = _u2pl_ael(build, low=0.3, high=0.6), _Spy(with_ael.make_pixels)
    monkeypatch.setattr(with_ael, "make_pixels", pixels)
    task = _prepared(method, monkeypatch)
    method(batch(), step(START))
    full, small = _entropy(method, task[0])
    known = (task[0].of_mixed.confidence > 0).numpy()
    seen = shrink(torch.from_numpy(known), (small.shape[1], small.shape[2])).numpy()
    low, high = np.quantile(full[known], [0.3, 0.6])
    *_, truth, label, anchors, negatives = pixels.given
    assert truth is task[0].labeled.truth
    assert np.array_equal(label != 255, known)
    assert np.array_equal(anchors, seen & (small <= low))
    assert np.array_equal(negatives, seen & (small >= high))


def test_its_parts_are_set_in_their_own_sections(build):
    method = _u2pl_ael(build)
    assert method.u2pl.anchors == 8
    assert method.options.threshold == 0.7
    with pytest.raises(UserError, match=r"u2pl_ael.low 0.9: must not be above"):
        _u2pl_ael(build, low=0.9)


def test_every_option_of_u2pl_is_read_or_called_ignored(build, monkeypatch):
    read: set[str] = set()

    class Recorded(U2PLOptions):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    def recorded(*args: Any) -> U2PLOptions:
        read.clear()  # what the checks of the values have read
        options = Recorded(**dataclasses.asdict(read_options(*args)))
        read.clear()
        return options

    monkeypatch.setattr(with_ael, "read_options", recorded)
    method = _u2pl_ael(build)
    method(batch(), step(START))
    names = {each.name for each in dataclasses.fields(U2PLOptions)}
    ignored = {key.removeprefix("u2pl.") for key in U2PLAELOptions.ignored}
    assert names - read == ignored
    listed = (ROOT / "docs" / "methods.md").read_text().partition("Of the section `u2pl` these have one:")[2]
    assert set(re.findall(r"`(\w+)`", listed.partition(".")[0])) == names - ignored


def test_the_binary_loss_is_another(build):
    found = []
    for loss in ("contrastive", "binary"):
        method = _u2pl_ael(build)
        method.u2pl = dataclasses.replace(method.u2pl, loss=loss)
        found.append(method(batch(), step(START)).terms["contrastive"].item())
    assert found[0] != found[1]
