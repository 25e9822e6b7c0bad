"""The contrastive part on two real ranks: the bank and the gradient of one, and no rank waits for the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config.cli import resolve
from pipeline.methods import OPTIONS, build_method
from pipeline.methods.base import Step
from pipeline.methods.u2pl.bank import MemoryBank
from pipeline.methods.u2pl.fast import candidates, contrastive, positives
from pipeline.methods.u2pl.reference import Draws, Pixels, Rule
from pipeline.ops.world import World
from tests.unit.methods.conftest import batch
from tests.unit.methods.u2pl.banks import ordered

CLASSES, DIM, SIDE = 3, 4, 6


def _pixels(images: list[int]) -> Pixels:
    """Some of four images, the first two labeled. Each has every class on 12 sure pixels: all pools have 12 or 24."""
    torch.manual_seed(0)
    label = torch.stack([torch.randperm(SIDE * SIDE).view(SIDE, SIDE) % CLASSES for _ in range(4)])
    second = (label + 1) % CLASSES
    logits = torch.stack([4.0 * (label == c) + 2.0 * (second == c) for c in range(CLASSES)], 1)
    features = torch.randn(2, 4, DIM, SIDE, SIDE)
    everywhere = torch.ones(4, SIDE, SIDE, dtype=torch.bool)
    whole = Pixels(features[0], features[1], logits, label, everywhere, everywhere, 2)
    tensors = {name: getattr(whole, name)[images] for name in whole._fields if name != "labeled"}
    return whole._replace(**tensors, labeled=sum(index < 2 for index in images))


def _share(images: list[int], world: World) -> dict[str, Any]:
    """Loss, gradient and bank; anchors and negatives are drawn exhaustively, so no chance is left."""
    pixels = _pixels(images)
    pixels = pixels._replace(student=pixels.student.requires_grad_())

    def every(count: int) -> Tensor:
        return ((torch.arange(count) + 0.5) / count).expand(CLASSES, -1)

    # labeled pixels of another class that lead (rank < 2), unlabeled ones of the class ranked 2: 12 each per image
    draws = Draws(every(48), torch.zeros(CLASSES, 4 * SIDE * SIDE), every(48)[:, None])
    bank = MemoryBank([200] * CLASSES, DIM)
    found = candidates(pixels, Rule(0.3, 2, 3), draws)
    loss = contrastive(pixels, found, positives(found, world), bank, draws, 0.5, world)
    loss.backward()
    keys = [sorted(ordered(bank, label).tolist()) for label in range(CLASSES)]
    return {"loss": loss.detach(), "gradient": pixels.student.grad, "keys": keys, "bank": bank.keys}


def _unequal_classes(rank: int, world: World) -> float:
    """A step of the whole method in which the ranks have no class in common."""
    small = {"warmup": 0, "anchors": 8, "negatives": 4, "keys": 8, "queue": 20, "queue_background": 20}
    model = {"backbone": "tiny", "weights": "none", "feature_dim": 8}
    torch.manual_seed(0)
    config = resolve({"method": "u2pl", "model": model, "optim": {"steps": 4}, "u2pl": small}, OPTIONS)
    method = build_method(config, 5).train()
    both = batch(seed=rank)
    assert both.labeled.mask is not None
    both.labeled.mask.copy_((both.labeled.mask % 2 + 2 * rank).where(both.labeled.mask != 255, 255))
    losses = method(Batch(both.labeled, both.unlabeled), Step(0, 4, 0, world))
    return float(torch.stack(list(losses.terms.values())).sum())


def _rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    world = World.current()
    found = _share([rank, 2 + rank], world) | {"unequal": _unequal_classes(rank, world)}
    torch.save(found, f"{store}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    store = str(tmp_path_factory.mktemp("ranks") / "store")
    mp.spawn(_rank, (store,), nprocs=2)  # type: ignore[attr-defined]
    return [torch.load(Path(f"{store}.{rank}"), weights_only=True) for rank in range(2)]


def test_two_ranks_have_the_bank_of_one(ranks):
    alone = _share([0, 1, 2, 3], World())
    assert all(len(keys) > 12 for keys in alone["keys"])
    assert ranks[0]["keys"] == ranks[1]["keys"] == alone["keys"]
    assert torch.equal(ranks[0]["bank"], ranks[1]["bank"])


def test_two_ranks_have_the_loss_and_the_gradient_of_one(ranks):
    alone = _share([0, 1, 2, 3], World())
    assert alone["loss"] > 0
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, alone["loss"])
    for rank, found in enumerate(ranks):
        share = alone["gradient"][[rank, 2 + rank]]
        assert share.any()
        torch.testing.assert_close(found["gradient"] / 2, share, rtol=1e-4, atol=1e-6)


def test_ranks_with_different_classes_finish_their_step(ranks):
    assert all(torch.isfinite(torch.tensor(found["unequal"])) for found in ranks)
