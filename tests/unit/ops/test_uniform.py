import subprocess
import sys

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.ops.world import uniform

CPU = torch.device("cpu")


def test_the_same_name_gives_the_same_numbers():
    first = uniform("a/0", (50, 3), device=CPU)
    torch.manual_seed(7)
    torch.rand(5)
    assert torch.equal(first, uniform("a/0", (50, 3), CPU))
    for name in ("a/1", "b/0", "a/0 ", ""):
        assert not torch.isclose(first, uniform(name, (50, 3), CPU)).all(1).any()


def test_the_numbers_are_those_of_another_process():
    """No hash of Python's, which each process salts."""
    call = "print(uniform('x', (3,), torch.device('cpu')).tolist())"
    program = f"import torch; from {uniform.__module__} import uniform; {call}"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(uniform("x", (3,), CPU).tolist())


def test_the_numbers_are_uniform_in_0_to_1():
    drawn = uniform("many", (100_000,), CPU)
    assert drawn.dtype == torch.float32
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts = torch.histc(drawn, 10, 0, 1)
    assert (counts - 10_000).abs().max() < 500  # 5 standard deviations


def test_the_generator_of_the_process_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    uniform("a", (9,), CPU)
    assert torch.equal(torch.rand(3), expected)


def test_fake_tensors_have_shape_and_type():
    with FakeTensorMode():
        found = uniform("a", (4, 5), CPU)
    assert (found.shape, found.dtype, found.device) == ((4, 5), torch.float32, CPU)


def test_it_compiles_as_a_whole():
    def function(x: Tensor) -> Tensor:
        return x + uniform("a", (4,), x.device)

    torch._dynamo.reset()
    found = torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(4))
    assert torch.equal(found, uniform("a", (4,), CPU))
    torch._dynamo.reset()
