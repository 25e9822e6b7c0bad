import math

import torch

from pipeline.methods.pc2seg import PairViews, pair_contrast
from tests.unit.ops.worlds import on_ranks

TAU, NEGATIVES = 0.5, 10


def _views() -> PairViews:
    torch.manual_seed(0)
    valid = torch.rand(4, 5, 5) < 0.7
    valid[3] = False
    return PairViews(torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5), torch.randint(0, 3, (4, 5, 5)), valid)


def _slow(views: PairViews, anchors: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """From the words of the reconstruction, anchor by anchor."""

    def chosen(b: int, draws: torch.Tensor) -> list[tuple[int, int]]:
        pixels = views.valid[b].nonzero().tolist()
        return [tuple(pixels[int(u * len(pixels))]) for u in draws] if pixels else []

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm()

    pool = [(b, y, x) for b in range(4) for y, x in chosen(b, keys[b])]
    losses = []
    for b in range(4):
        for y, x in chosen(b, anchors[b]):
            z = unit(views.strong[b, :, y, x])
            others = [
                unit(views.weak[o, :, v, w])
                for o, v, w in pool
                if o != b and views.label[o, v, w] != views.label[b, y, x]
            ]
            if others:
                positive = (z @ unit(views.weak[b, :, y, x]) / TAU).exp()
                negative = torch.stack([(z @ other / TAU).exp() for other in others]).mean() * NEGATIVES
                losses.append(-(positive / (positive + negative)).log())
    return torch.stack(losses).mean()


def test_loss_and_gradient_against_a_loop_on_any_number_of_ranks():
    views = _views()
    anchors, keys = torch.rand(4, 7), torch.rand(4, 6)
    reference = views.strong.clone().requires_grad_()
    expected = _slow(views._replace(strong=reference), anchors, keys)
    expected.backward()
    for ranks in (1, 2, 4):
        inputs = [part.clone().requires_grad_() for part in views.strong.chunk(ranks)]

        def run(world, ranks=ranks, inputs=inputs):
            part = PairViews(inputs[world.rank], *(x.chunk(ranks)[world.rank] for x in views[1:]))
            draws = anchors.chunk(ranks)[world.rank], keys.chunk(ranks)[world.rank]
            return pair_contrast(part, *draws, NEGATIVES, TAU, world)

        total = torch.stack(on_ranks(ranks, run)).mean()
        total.backward()
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(torch.cat([part.grad for part in inputs if part.grad is not None]), reference.grad)


def test_without_negatives_the_loss_is_0_with_a_graph():
    views = _views()
    views = views._replace(strong=views.strong.requires_grad_(), label=torch.zeros(4, 5, 5, dtype=torch.long))
    loss = on_ranks(1, lambda world: pair_contrast(views, torch.rand(4, 3), torch.rand(4, 3), NEGATIVES, TAU, world))[0]
    loss.backward()
    assert loss == 0
    assert views.strong.grad is not None
    assert views.strong.grad.isfinite().all()


def test_a_chance_network_scores_log_of_one_plus_n():
    views = _views()._replace(strong=torch.ones(4, 6, 5, 5), weak=torch.ones(4, 6, 5, 5))
    loss = on_ranks(1, lambda world: pair_contrast(views, torch.rand(4, 9), torch.rand(4, 9), NEGATIVES, TAU, world))[0]
    assert abs(float(loss) - math.log(1 + NEGATIVES)) < 1e-5
