"""A method of the registry with the tiny network, and batches made by hand."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from pipeline.batch import Batch, Views
from pipeline.config.cli import resolve
from pipeline.config.methods import OPTIONS, SPECS
from pipeline.methods import Method, Step, build_method
from pipeline.models import SegmentationModel, upsample
from pipeline.ops.world import World

SIZE = 24
CLASSES = 5
TOTAL = 20
STRONG = max(spec.views.strong for spec in SPECS.values())
"""Strong views of a batch made by hand: as many as any method asks for."""

CPU = torch.device("cpu")

Build = Callable[..., Method]


@pytest.fixture
def build() -> Build:
    """Makes a method that fits 24 x 24 pixels."""
    return small


def small(
    name: str,
    classes: int = CLASSES,
    aux: float = 0.0,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    optim: Mapping[str, Any] | None = None,
    supervised: Mapping[str, Any] | None = None,
    **options: Any,
) -> Method:
    """A method with the tiny network; where an option has a size, it is small enough for 24 x 24 pixels."""
    values = {
        "method": name,
        "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8, **(model or {})},
        "loss": {"aux_weight": aux, **(supervised or {})},
        "optim": {"steps": TOTAL, **(optim or {})},
        "data": {"crop": (SIZE, SIZE), "background": "0", **(data or {})},
        "u2pl": {"warmup": 2, "anchors": 8, "negatives": 4, "keys": 8, "queue": 20, "queue_background": 30},
        "gct": {"detector_width": 8},
        "u2pl_ael": {"contrast_start": 3},
    }
    values[name] = {**values.get(name, {}), **options}
    torch.manual_seed(0)
    return build_method(resolve(values, OPTIONS), classes).train()


def views(count: int, *, masked: bool, seed: int = 0, classes: int = CLASSES) -> Views:
    """Images of noise whose masks follow their brightness, in blocks; the strong views are brighter and darker.

    Unlabeled images have pseudo-labels instead of masks, for the methods that ask for them.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, classes, (count, SIZE // 6, SIZE // 6), generator=generator)
    mask = coarse.repeat_interleave(6, 1).repeat_interleave(6, 2)
    noise = torch.randint(0, 30, (count, 3, SIZE, SIZE), generator=generator)
    image = (mask[:, None] * (200 // classes) + noise).to(torch.uint8)
    mask[:, 0] = 255
    valid = torch.ones(count, SIZE, SIZE, dtype=torch.bool)
    valid[:, :, 0] = False
    ids = tuple(f"{'l' if masked else 'u'}{seed}{i}" for i in range(count))
    shifts = () if masked else torch.randint(-20, 20, (STRONG, count, 3, 1, 1), generator=generator)
    strong = tuple((image + shift).clamp(0, 255).to(torch.uint8) for shift in shifts)
    return Views(image, mask if masked else None, valid, ids, strong, None if masked else mask)


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
    """One step as the loop makes it, by plain SGD; returns the loss terms.

    What asks for Adam diverges under SGD: it gets Adam's first step, the sign of the gradient at the group's own rate.
    """
    torch.manual_seed(index)
    terms = method(on or batch(seed=index), step(index)).terms
    method.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()
    with torch.no_grad():
        for group in method.param_groups():
            adam = group.get("optimizer") == "adam"
            rate = method.config.optim.lr * group["lr_mult"] if adam else lr
            for parameter in group["params"]:
                assert parameter.grad is not None
                parameter.sub_(rate * (parameter.grad.sign() if adam else parameter.grad))
    method.after_step(step(index))
    return {name: value.detach() for name, value in terms.items()}


def noted(network: SegmentationModel) -> list[torch.Tensor]:
    """The images that a network looks at from now on, whichever of its heads are read."""
    seen: list[torch.Tensor] = []
    normalise = network.normalise

    def look(image: torch.Tensor) -> torch.Tensor:
        seen.append(image)
        return normalise(image)

    network.normalise = look  # type: ignore[method-assign]
    return seen


def full(logits: torch.Tensor) -> torch.Tensor:
    """Logits [B,C,h,w] at the size of the images."""
    return upsample(logits, (SIZE, SIZE))


def pseudo_loss(
    logits: torch.Tensor, weak: torch.Tensor, source: torch.Tensor, valid: torch.Tensor, threshold: float
) -> tuple[float, float]:
    """FixMatch's loss pixel by pixel: sum of the confident cross entropies / valid pixels of the mixed images.

    Args:
        logits: float [B,C,H,W] of the strong view.
        weak: float [B,C,H,W], probabilities of the clean weak view.
        source: int64 [B,H,W], the flat number of the clean pixel that each mixed pixel comes from.
        valid: bool [B,H,W] of the clean images.
        threshold: of the probability.

    Returns:
        The loss, and the share of the clean images' valid pixels that is confident.
    """
    probability, label = (value.flatten() for value in weak.max(1))
    known, total, count = valid.flatten(), 0.0, 0
    for b, y, x in torch.ones_like(valid).nonzero().tolist():
        pixel = source[b, y, x]
        count += int(known[pixel])
        if known[pixel] and probability[pixel] >= threshold:
            total -= float(logits[b, :, y, x].log_softmax(0)[label[pixel]])
    return total / count, float((known & (probability >= threshold)).sum() / known.sum())
