import torch

from pipeline.methods.ael.sampling import ClassConfidence, draw_index
from tests.unit.ops.worlds import on_ranks


def _loop(value, logits, target, momentum):
    new = value.clone()
    for k in range(len(value)):
        pixels = (target == k).nonzero().tolist()
        if pixels:
            mean = sum(float(logits[b, :, y, x].softmax(0)[k]) for b, y, x in pixels) / len(pixels)
            new[k] = momentum * value[k] + (1 - momentum) * mean
    return new


def test_confidence_is_a_running_mean_over_all_ranks_and_absent_classes_stay():
    torch.manual_seed(0)
    logits, target = torch.randn(4, 5, 3, 4), torch.randint(0, 4, (4, 3, 4))
    target[0] = 255
    expected = _loop(torch.full((5,), 0.5), logits, target, 0.9)
    assert expected[4] == 0.5
    for ranks in (1, 2, 4):

        def run(world, ranks=ranks):
            confidence = ClassConfidence(5, 0.9)
            confidence.update(logits.chunk(ranks)[world.rank], target.chunk(ranks)[world.rank], world)
            return confidence.value

        for found in on_ranks(ranks, run):
            torch.testing.assert_close(found, expected)


def test_rates_and_preferences_favour_the_unknown():
    confidence = ClassConfidence(3, 0.999)
    torch.testing.assert_close(confidence.sampling_rate(), torch.ones(3))
    confidence.value.copy_(torch.tensor([0.9, 0.2, 0.6]))
    torch.testing.assert_close(confidence.sampling_rate(), torch.tensor([0.125, 1.0, 0.5]))
    rest = torch.tensor([0.1, 0.8, 0.4])
    torch.testing.assert_close(confidence.preference(), rest.exp() / rest.exp().sum())
    torch.testing.assert_close(confidence.preference(0.5), rest.sqrt().exp() / rest.sqrt().exp().sum())
    confidence.value.fill_(1.0)
    assert confidence.sampling_rate().tolist() == [0, 0, 0]


def test_draws_follow_the_weights_and_never_take_an_empty_one():
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0])
    drawn = draw_index(weights, torch.arange(1000).float() / 1000)
    assert torch.bincount(drawn, minlength=5).tolist() == [0, 250, 0, 750, 0]
    assert draw_index(torch.zeros(3), torch.rand(4)).lt(3).all()
