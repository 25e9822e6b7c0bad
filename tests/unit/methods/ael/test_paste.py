import torch

from pipeline.methods.ael.sampling import zoomed


def _sample() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.randint(0, 5, (1, 4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    return (mask[:, None] * 40).expand(1, 3, 16, 16).to(torch.uint8), mask


def test_zoom_1_is_the_image_or_its_mirror():
    image, mask = _sample()
    for flip, turn in ((0.0, lambda x: x.flip(-1)), (0.9, lambda x: x)):
        found = zoomed(image, mask, torch.tensor([[0.5, 0.3, 0.8, flip]]), (1.0, 1.0))
        assert torch.equal(found[0], turn(image))
        assert torch.equal(found[1], turn(mask))


def test_half_the_size_in_a_corner():
    image, mask = _sample()
    found, label = zoomed(image, mask, torch.tensor([[0.0, 0.0, 0.999999, 0.9]]), (0.5, 1.0))
    assert torch.equal(label[:, :8, 8:], mask[:, ::2, ::2])
    assert (label[:, 8:] == 255).all()
    assert (label[:, :, :8] == 255).all()
    assert torch.equal(found[:, 0, :8, 8:].long() // 40, label[:, :8, 8:])  # blocks of 4: no blending inside


def test_twice_the_size_shows_a_part():
    image, mask = _sample()
    _, label = zoomed(image, mask, torch.tensor([[0.999999, 0.0, 0.0, 0.9]]), (1.0, 2.0))
    assert (label != 255).all()
    assert len(label.unique()) <= len(mask.unique())


def test_shrinking_averages_what_it_drops():
    """A checkerboard becomes grey, not a random one of its colours."""
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 200
    image = board.expand(1, 3, 32, 32).to(torch.uint8)
    for zoom in (0.5, 0.25):
        found, label = zoomed(image, torch.zeros(1, 32, 32, dtype=torch.long), torch.rand(1, 4), (zoom, zoom))
        assert (found[0, 0][label[0] == 0].float() - 100).abs().max() <= 1
