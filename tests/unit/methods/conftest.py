"""A method of the registry with the tiny network, and batches made by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.batch import Batch, Views
from pipeline.cli import resolve
from pipeline.methods import OPTIONS, Method, Step, build_method
from pipeline.ops.world import World

SIZE = 24
CLASSES = 5
TOTAL = 20

Build = Callable[..., Method]


@pytest.fixture
def build() -> Build:
    """Makes a method; options of U2PL are small enough for 24 x 24 pixels."""

    def make(name: str, classes: int = CLASSES, aux: float = 0.0, **options: Any) -> Method:
        values = {
            "method": name,
            "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8},
            "loss": {"aux_weight": aux},
            "optim": {"steps": TOTAL},
            "u2pl": {"warmup_steps": 2, "anchors": 8, "negatives": 4, "keys": 8, "queue": 20, "queue_background": 30},
        }
        values["u2pl"] |= options
        torch.manual_seed(0)
        return build_method(resolve(values, OPTIONS), classes).train()

    return make


def views(count: int, *, masked: bool, seed: int = 0, classes: int = CLASSES) -> Views:
    """Images of noise whose masks follow their brightness, in blocks."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, classes, (count, SIZE // 6, SIZE // 6), generator=generator)
    mask = coarse.repeat_interleave(6, 1).repeat_interleave(6, 2)
    noise = torch.randint(0, 30, (count, 3, SIZE, SIZE), generator=generator)
    image = (mask[:, None] * (200 // classes) + noise).to(torch.uint8)
    mask[:, 0] = 255
    valid = torch.ones(count, SIZE, SIZE, dtype=torch.bool)
    valid[:, :, 0] = False
    ids = tuple(f"{'l' if masked else 'u'}{seed}{i}" for i in range(count))
    return Views(image, mask if masked else None, valid, ids)


def batch(count: int = 2, seed: int = 0, classes: int = CLASSES) -> Batch:
    """`count` labeled and `count` unlabeled images."""
    return Batch(
        views(count, masked=True, seed=seed, classes=classes),
        views(count, masked=False, seed=seed + 100, classes=classes),
    )


def step(index: int) -> Step:
    """A step of a run of 20."""
    return Step(index, TOTAL, seed=0, world=World())


def train_step(method: Method, index: int, on: Batch | None = None, lr: float = 0.01) -> dict[str, torch.Tensor]:
    """One step as the loop makes it; returns the loss terms."""
    torch.manual_seed(index)
    terms = method(on or batch(seed=index), step(index)).terms
    method.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.sub_(lr * parameter.grad)
    method.after_step(step(index))
    return {name: value.detach() for name, value in terms.items()}
