import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.methods import cct
from pipeline.ops import mixing


@pytest.fixture
def features() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(3, 8, 6, 7) + 0.1


def test_dropout_hides_whole_channels_and_keeps_the_mean(features):
    draws = torch.rand(3, 8)
    found = mixing.drop_channels(features, draws, 0.25)
    for b in range(3):
        for c in range(8):
            expected = torch.zeros(6, 7) if draws[b, c] < 0.25 else features[b, c] / 0.75
            torch.testing.assert_close(found[b, c], expected)
    assert mixing.drop_channels(features.bfloat16(), draws, 0.25).dtype == torch.bfloat16
    assert torch.equal(mixing.drop_channels(features, draws, 0.0), features)


def test_noise_is_shared_by_the_batch_and_bounded(features):
    factor = cct.scale_noise(features, torch.rand(8, 6, 7), 0.3) / features
    torch.testing.assert_close(factor[0], factor[1])
    assert 0.7 <= factor.min() < 0.75
    assert 1.25 < factor.max() <= 1.3
    torch.testing.assert_close(cct.scale_noise(features, torch.full((8, 6, 7), 0.5), 0.3), features)


def test_feature_drop_hides_the_most_active_cells(features):
    found = cct.drop_salient(features, torch.tensor([0.5]), 0.7, 0.9)
    for b in range(3):
        activity = features[b].mean(0)
        for y in range(6):
            for x in range(7):
                kept = activity[y, x] < 0.8 * activity.max()
                torch.testing.assert_close(found[b, :, y, x], features[b, :, y, x] * kept)
    assert found.any()
    assert not found.all()


def test_guided_cutout_takes_a_part_of_each_objects_box():
    label = torch.zeros(2, 20, 20, dtype=torch.long)
    label[0, 2:12, 5:15] = 1  # 10 x 10: a cut of 4 x 4
    label[0, 15:20, 0:20] = 2  # 5 x 20: a cut of 2 x 8
    label[1, 3, 3] = 1  # one pixel: no cut
    foreground = torch.tensor([[False, True, True]]).expand(2, -1)
    kept = cct.guided_cutout(label, foreground, torch.full((2, 3, 2), 0.999), 0.4)
    expected = torch.ones(2, 20, 20, dtype=torch.bool)
    expected[0, 8:12, 11:15] = False  # the last place inside the box
    expected[0, 18:20, 12:20] = False
    assert torch.equal(kept, expected)
    first = cct.guided_cutout(label, foreground, torch.zeros(2, 3, 2), 0.4)
    assert not first[0, 2:6, 5:9].any()
    assert int((~first).sum()) == 4 * 4 + 2 * 8
    assert cct.guided_cutout(label, torch.zeros(2, 3, dtype=torch.bool), torch.rand(2, 3, 2), 0.4).all()


def _head() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))


def _divergence(head: nn.Module, clean: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    return F.kl_div(head(moved).log_softmax(1), head(clean).softmax(1), reduction="sum")


def test_the_adversarial_shift_is_the_power_step_of_the_paper(features):
    """Against float64 and a differenced gradient; and it does more harm than a random shift of its length."""
    head, draws = _head(), torch.rand(3, 8, 6, 7)
    shift = cct.adversarial(features, head, draws, 1.0, 2.0) - features
    torch.testing.assert_close(shift.flatten(1).norm(dim=1), torch.full((3,), 2.0))

    exact, clean = _head().double(), features.double()
    start = draws.double() - 0.5
    start = start / start.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for b, c, y, x in [(0, 1, 2, 3), (1, 0, 0, 0), (2, 7, 5, 6)]:
        nudge = torch.zeros_like(start)
        nudge[b, c, y, x] = 1e-4
        up, down = (_divergence(exact, clean, clean + start + sign * nudge) for sign in (1, -1))
        other = torch.zeros_like(start)
        other[b, c - 1, y, x] = 1e-4
        up2, down2 = (_divergence(exact, clean, clean + start + sign * other) for sign in (1, -1))
        ratio = shift[b, c, y, x] / shift[b, c - 1, y, x]
        torch.testing.assert_close(ratio.double(), (up - down) / (up2 - down2), rtol=1e-3, atol=1e-4)

    random = start / start.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 2.0
    harm = _divergence(exact, clean, clean + shift.double())
    assert harm > 1.2 * _divergence(exact, clean, clean + random)


def test_the_adversarial_probe_leaves_no_gradient_behind_and_works_in_bfloat16(features):
    head = _head()
    with torch.autocast("cpu", torch.bfloat16):
        found = cct.adversarial(features.bfloat16(), head, torch.rand(3, 8, 6, 7), 1.0, 2.0)
    assert all(p.grad is None for p in head.parameters())
    torch.testing.assert_close((found - features).flatten(1).norm(dim=1), torch.full((3,), 2.0), rtol=0.05, atol=0)
    with torch.no_grad():
        assert cct.adversarial(features, head, torch.rand(3, 8, 6, 7), 1.0, 2.0).isfinite().all()


def test_the_probing_step_of_the_release_is_lost_in_float32():
    """Why xi is 1 here: at 1e-6 the direction is rounding noise and the shift, divided by norm + 1e-8, is 0."""
    torch.manual_seed(0)
    head, x = nn.Conv2d(96, 21, 1), torch.rand(2, 96, 16, 16)
    draws = torch.rand_like(x)
    near = cct.adversarial(x, head, draws, 1e-6, 1.0) - x
    far = cct.adversarial(x, head, draws, 1.0, 1.0) - x
    exact = cct.adversarial(x, head, draws, 0.1, 1.0) - x
    assert F.cosine_similarity(near.flatten(1), exact.flatten(1)).abs().max() < 0.3
    assert F.cosine_similarity(far.flatten(1), exact.flatten(1)).min() > 0.99


def test_a_constant_head_gives_no_shift(features):
    head = nn.Conv2d(8, 3, 1)
    nn.init.zeros_(head.weight)
    assert torch.equal(cct.adversarial(features, head, torch.rand(3, 8, 6, 7), 1.0, 2.0), features)
