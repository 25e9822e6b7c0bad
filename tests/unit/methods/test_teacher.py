import pytest
import torch
from torch import nn

from pipeline.methods.teacher import follow


def _net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net(torch.randn(2, 3, 4, 4))
    return net


def test_parameters_are_averaged_and_buffers_are_not():
    teacher, student = _net(0), _net(1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    follow(teacher, student, 0.9)
    for name, mine in teacher.named_parameters():
        torch.testing.assert_close(mine, 0.9 * before[name] + 0.1 * student.get_parameter(name))
    for name, mine in teacher.named_buffers():
        assert torch.equal(mine, before[name])


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_all_at_once_is_bit_for_bit_what_one_by_one_is(decay):
    teacher, student = _net(0), _net(1)
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    expected = [mine.detach().lerp(other, 1.0 - decay) for mine, other in pairs]
    follow(teacher, student, decay)
    assert all(torch.equal(mine, other) for mine, other in zip(teacher.parameters(), expected, strict=True))


def test_decay_0_copies_everything_but_the_storage():
    teacher, student = _net(0), _net(1)
    follow(teacher, student, 0.0)
    for name, mine in teacher.state_dict().items():
        assert torch.equal(mine, student.state_dict()[name])
    student[0].weight.data.add_(1)  # type: ignore[operator]
    assert not torch.equal(teacher[0].weight, student[0].weight)  # type: ignore[arg-type]


def test_buffers_are_averaged_where_asked_for():
    """Statistics are, the counter of batches is copied."""
    teacher, student = _net(0), _net(1)
    student(torch.randn(2, 3, 4, 4))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    follow(teacher, student, 0.9, buffers=True)
    for name, mine in teacher.state_dict().items():
        other = student.state_dict()[name]
        expected = 0.9 * before[name] + 0.1 * other if mine.is_floating_point() else other
        torch.testing.assert_close(mine, expected)
        assert mine.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    assert not torch.equal(teacher.state_dict()["1.running_mean"], before["1.running_mean"])
