import math

import torch
import torch.nn.functional as F

from pipeline.methods.gct import exchange, flaw_target, gaussian_blur, handled, min_max


def _blurred(image: torch.Tensor, size: int) -> torch.Tensor:
    """Pixel by pixel, with mirrored indices."""
    width = size if size % 2 else size + 1
    sigma, half = 0.3 * ((width - 1) * 0.5 - 1) + 0.8, width // 2
    weight = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(-half, half + 1)]

    def mirror(i: int, n: int) -> int:
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    height, length = image.shape
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(length):
            for i, a in enumerate(weight):
                for j, b in enumerate(weight):
                    out[y, x] += a * b * image[mirror(y + i - half, height), mirror(x + j - half, length)]
    return out / sum(weight) ** 2


def test_blur_against_a_loop():
    torch.manual_seed(0)
    image = torch.rand(2, 1, 8, 9)
    for size in (1, 3, 4):
        found = gaussian_blur(image, size)
        for b in range(2):
            torch.testing.assert_close(found[b, 0], _blurred(image[b, 0], size), rtol=1e-4, atol=1e-5)


def test_a_constant_image_has_no_flaw():
    assert not min_max(torch.full((1, 1, 4, 4), 0.3)).any()


def test_target_follows_the_recipe_of_the_release():
    torch.manual_seed(0)
    probability = torch.randn(2, 3, 24, 24).softmax(1)
    truth = torch.randint(0, 3, (2, 24, 24))
    truth[:, :4] = 255
    found = flaw_target(probability, truth, 0.5, 1)
    for b in range(2):
        error = torch.zeros(24, 24)
        for y in range(24):
            for x in range(24):
                if truth[b, y, x] != 255:
                    onehot = torch.zeros(3)
                    onehot[truth[b, y, x]] = 1.0
                    error[y, x] = 0.5 * (onehot - probability[b, :, y, x]).abs().sum()
        blurred = _blurred(error, 3)
        dilated = F.max_pool2d(F.pad(blurred[None, None], (1, 1, 1, 1), mode="reflect"), 3, stride=1)[0, 0]
        again = _blurred(dilated, 6)
        expected = (again - again.min()) / (again.max() - again.min())
        torch.testing.assert_close(found[b, 0], expected, rtol=1e-3, atol=1e-4)
    assert not flaw_target(probability, torch.full_like(truth, 255), 0.5, 1).any()


def test_handling_zeroes_small_flaws_and_stretches_the_others():
    flaw = torch.stack([torch.full((1, 32, 32), 0.05), torch.rand(1, 32, 32) - 0.2])
    found = handled(flaw)
    assert not found[0].any()
    smooth = _blurred(flaw[1, 0].clamp_min(0), 2)
    expected = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    torch.testing.assert_close(found[1, 0], expected, rtol=1e-3, atol=1e-4)


def test_the_better_network_teaches_and_two_bad_ones_keep_apart():
    left, right = torch.full((1, 2, 1, 4), 1.0), torch.full((1, 2, 1, 4), 2.0)
    left_flaw = torch.tensor([0.1, 0.5, 0.7, 0.9]).view(1, 1, 1, 4)
    right_flaw = torch.tensor([0.2, 0.3, 0.9, 0.6]).view(1, 1, 1, 4)
    found = exchange(left, right, left_flaw, right_flaw, 0.6)
    assert found.targets[0][0, 0, 0].tolist() == [1.0, 2.0, 1.0, 2.0]  # both bad: its own, though the other is better
    assert found.targets[1][0, 0, 0].tolist() == [1.0, 2.0, 2.0, 2.0]
    assert found.both_bad.flatten().tolist() == [False, False, True, False]
