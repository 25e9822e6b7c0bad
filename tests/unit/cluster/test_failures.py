import re

import pytest
import torch

from pipeline.cluster.failures import explained, out_of_memory, traceback_of
from pipeline.errors import UserError

RAYS = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: bde085e9c9) "
    "was 7.08GB used / 23.54GB limit (0.300769)\nOOM kill reason: Memory usage 7577399296B exceeded threshold of "
    "1263803008B (5.0% of 25276059648B limit)\nRefer to the documentation on how to address the out of memory issue."
)
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 79.15 GiB of which 1.47 GiB is free."
    " Including non-PyTorch memory, this process has 77.66 GiB memory in use. Of the allocated memory 75 GiB is its own"
)


def test_a_node_without_memory_is_named_with_what_to_lower() -> None:
    assert explained(Exception(RAYS)) == (
        "node 10.0.0.7 ran out of memory (7.08 of 23.54 GB used): lower optim.batch_labeled, optim.batch_unlabeled or "
        "data.crop, raise optim.accumulate, or put fewer workers on a node (scaling.cpus_per_worker)"
    )


def test_else_the_last_line_is_told() -> None:
    assert explained(Exception("first\n\n  the last one \n\n")) == "the last one"
    assert explained(ValueError()) == "ValueError"
    assert len(explained(Exception("x" * 500))) == 200


def test_a_gpu_out_of_memory() -> None:
    found = out_of_memory(torch.OutOfMemoryError(CUDA), "NVIDIA H100")
    assert str(found).startswith(
        "NVIDIA H100 is out of memory (Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 79.15 GiB of which "
        "1.47 GiB): raise optim.accumulate, pass --model.checkpoint_activations true or --run.precision bf16, take more"
    )


def test_a_cpu_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    found = out_of_memory(error.value, "cpu")
    assert str(found).startswith("cpu is out of memory (you tried to allocate 4000000000000000 bytes): raise optim.")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 3.00 TiB for an array"), r"\(Unable to allocate 3\.00 TiB for an array\)"),
        (MemoryError(), r"\(MemoryError\)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), r"ALLOC_FAILED\)"),
        (RuntimeError("CUDA error: out of memory"), r"\(CUDA error: out of memory\)"),
    ],
)
def test_who_says_so_may_be_another(error: RuntimeError | MemoryError, said: str) -> None:
    found = out_of_memory(error, "a GPU")
    assert isinstance(found, UserError)
    assert re.match(rf"^a GPU is out of memory .*{said}: raise optim\.accumulate", str(found))


def test_other_errors_are_not_about_memory() -> None:
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "cpu") is None


def test_only_faults_of_the_program_have_a_traceback() -> None:
    class Fault(Exception):
        cause = KeyError("x")

    assert (
        traceback_of({0: Exception("lost"), 1: Fault("Traceback ...\nKeyError: 'x'")}) == "Traceback ...\nKeyError: 'x'"
    )
    assert traceback_of({0: Exception("lost")}) == ""
